// The floor: what a loop in C needs that only reads streams, counts their events and notes their times.
//
//   floor PORT STREAMS RAMP_S WARM_S WINDOW_S TOKENS
//
// Closed loop on one core: each stream asks again as soon as its answer ended. Prints one JSON object about the window.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { STREAMS_MAX = 8192, MICROS = 2000000, READ_BYTES = 1 << 16 };

typedef struct {
  int64_t sent_ns, event_ns;
  char tail[16];  // of the body so far: the end may lie across two reads
  int tail_len;
} Stream;

static Stream *of[STREAMS_MAX + 1024];
static uint32_t ttft_us[MICROS], itl_us[MICROS];
static int64_t events;
static int counting;
static char request[1024];
static int request_len;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static double cpu_s(void) {
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static void count(uint32_t *histogram, int64_t ns) {
  int64_t us = ns / 1000;
  histogram[us < 0 ? 0 : us >= MICROS ? MICROS - 1 : us]++;
}

static double percentile_ms(const uint32_t *histogram, double share) {
  int64_t total = 0, seen = 0;
  for (int i = 0; i < MICROS; i++) total += histogram[i];
  for (int i = 0; i < MICROS; i++) {
    seen += histogram[i];
    if (total && seen >= share * total) return i / 1e3;
  }
  return -1;
}

static void ask(int fd) {
  Stream *s = of[fd];
  s->sent_ns = now_ns(), s->event_ns = 0, s->tail_len = 0;
  if (send(fd, request, request_len, MSG_NOSIGNAL) != request_len) perror("send"), exit(1);
}

static void take(int fd, int64_t now) {
  static char data[READ_BYTES];
  Stream *s = of[fd];
  ssize_t got = recv(fd, data, sizeof data, 0);
  if (got <= 0) {
    if (got < 0 && errno == EAGAIN) return;
    fprintf(stderr, "the server closed\n"), exit(1);
  }
  for (char *at = data; (at = memmem(at, data + got - at, "data: {\"", 8)); at += 8) {
    if (memmem(at, data + got - at < 160 ? data + got - at : 160, "\"choices\":[]", 12)) continue;  // usage
    if (counting) {
      events++;
      if (!s->event_ns) count(ttft_us, now - s->sent_ns); else count(itl_us, now - s->event_ns);
    }
    s->event_ns = now;
  }
  char end[32];
  int keep = s->tail_len;
  memcpy(end, s->tail, keep);
  int take_len = got < 8 ? got : 8;
  memcpy(end + keep, data + got - take_len, take_len);
  int len = keep + take_len;
  if (len >= 7 && !memcmp(end + len - 7, "\r\n0\r\n\r\n", 7)) return ask(fd);
  s->tail_len = len < 8 ? len : 8;
  memcpy(s->tail, end + len - s->tail_len, s->tail_len);
}

int main(int argc, char **argv) {
  if (argc != 7) return fprintf(stderr, "floor PORT STREAMS RAMP_S WARM_S WINDOW_S TOKENS\n"), 2;
  int port = atoi(argv[1]), streams = atoi(argv[2]), opened = 0;
  double ramp_s = atof(argv[3]), warm_s = atof(argv[4]), window_s = atof(argv[5]);
  struct rlimit files = {STREAMS_MAX + 1024, STREAMS_MAX + 1024};
  setrlimit(RLIMIT_NOFILE, &files);
  char body[256];
  int body_len = snprintf(body, sizeof body, "{\"model\": \"truth\", \"prompt\": \"floor\", \"max_tokens\": %d, \"stream\": true}", atoi(argv[6]));
  request_len = snprintf(request, sizeof request, "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s", body_len, body);
  int epoll_fd = epoll_create1(0);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  struct epoll_event ready[1024];
  int64_t start = now_ns(), begin = start + (int64_t)((ramp_s + warm_s) * 1e9), end = begin + (int64_t)(window_s * 1e9);
  double cpu_at_begin = 0;
  for (;;) {
    int64_t now = now_ns();
    if (now >= end) break;
    if (!counting && now >= begin) counting = 1, begin = now, cpu_at_begin = cpu_s();
    while (opened < streams && now - start >= (int64_t)(ramp_s * 1e9 * opened / streams)) {
      int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
      if (connect(fd, (struct sockaddr *)&address, sizeof address)) return perror("connect"), 1;
      fcntl(fd, F_SETFL, O_NONBLOCK), setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      of[fd] = calloc(1, sizeof(Stream));
      struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
      epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
      ask(fd), opened++;
    }
    int n = epoll_wait(epoll_fd, ready, 1024, 1);
    now = now_ns();
    for (int i = 0; i < n; i++) take(ready[i].data.fd, now);
  }
  double used_s = cpu_s() - cpu_at_begin, seconds = (now_ns() - begin) / 1e9;
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  printf("{\"events\": %ld, \"seconds\": %.6f, \"cpu_s\": %.6f, \"rss_bytes\": %ld, \"ttft_p50_s\": %.6f, \"ttft_p99_s\": %.6f, \"itl_p50_s\": %.6f, \"itl_p99_s\": %.6f}\n",
         events, seconds, used_s, used.ru_maxrss * 1024, percentile_ms(ttft_us, 0.5) / 1e3, percentile_ms(ttft_us, 0.99) / 1e3, percentile_ms(itl_us, 0.5) / 1e3, percentile_ms(itl_us, 0.99) / 1e3);
}
