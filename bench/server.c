// A server whose every event has a known time: the ground truth that load generators are measured against.
//
//   server PORT TTFT_US ITL_US TOKENS [own]
//
// One epoll loop on one core. A request's first event is due TTFT after its last byte was read, each later one ITL after the one
// before was due (never after it was sent, so lateness does not add up). With `own`, for a core that nothing else uses, it never sleeps
// while it streams: a core that goes idle between events, and a virtual one above all, can take milliseconds to come back. Answers POST /v1/completions and /v1/chat/completions like an
// OpenAI-compatible server that streams one token an event. GET /truth says how late events were handed to the kernel, the TTFT and ITL
// as handed over, and why it was late: its own work (busy_s), or a core that others had (waited_s). POST /reset begins a new count.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CONNECTIONS_MAX = 16384, IN_BYTES = 1 << 16, TOKENS_MAX = 4096, MICROS = 2000000, ID_LEN = 36 };
#define NO_ID "00000000-0000-0000-0000-000000000000"

typedef struct {
  int open, chat, streaming, token, tokens;
  int64_t due_ns, read_ns, sent_ns;
  char *in, *out;
  size_t in_len, out_len, out_at, out_size;
  char id[ID_LEN + 1];
} Connection;

typedef struct {  // a chunk, and where the request's id belongs
  char *bytes;
  size_t len, id_at;
} Event;

static Connection connections[CONNECTIONS_MAX];
static int heap[CONNECTIONS_MAX], heap_len, place[CONNECTIONS_MAX];
static uint32_t late_us[MICROS], ttft_us[MICROS], itl_us[MICROS];
static int64_t events, streams, blocked, counted_from_ns, busy_ns, waited_before_ns;
static int64_t ttft_ns, itl_ns;
static int default_tokens, epoll_fd, listener, own_core;
static Event text_events[2], last_events[2];
static int64_t answered;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void count(uint32_t *histogram, int64_t ns) {
  int64_t us = ns / 1000;
  histogram[us < 0 ? 0 : us >= MICROS ? MICROS - 1 : us]++;
}

static int64_t percentile(const uint32_t *histogram, double share) {
  int64_t total = 0, seen = 0;
  for (int i = 0; i < MICROS; i++) total += histogram[i];
  if (!total) return -1;
  for (int i = 0; i < MICROS; i++) {
    seen += histogram[i];
    if (seen >= share * total) return i;
  }
  return MICROS;
}

// ------------------------------------------------------------------------------------------ the heap of what is due, by time

static int before(int a, int b) { return connections[a].due_ns < connections[b].due_ns; }
static void put(int at, int fd) { heap[at] = fd, place[fd] = at; }

static void sift_up(int at) {
  int fd = heap[at];
  while (at > 0 && before(fd, heap[(at - 1) / 2])) put(at, heap[(at - 1) / 2]), at = (at - 1) / 2;
  put(at, fd);
}

static void sift_down(int at) {
  int fd = heap[at];
  for (;;) {
    int child = 2 * at + 1;
    if (child >= heap_len) break;
    if (child + 1 < heap_len && before(heap[child + 1], heap[child])) child++;
    if (!before(heap[child], fd)) break;
    put(at, heap[child]), at = child;
  }
  put(at, fd);
}

static void heap_add(int fd) { put(heap_len++, fd), sift_up(heap_len - 1); }

static void heap_remove(int fd) {
  int at = place[fd], last = heap[--heap_len];
  if (at == heap_len) return;
  put(at, last);
  sift_up(at), sift_down(place[last]);
}

// ------------------------------------------------------------------------------------------------------------- connections

static void hang_up(int fd) {
  Connection *c = &connections[fd];
  if (c->streaming) heap_remove(fd);
  free(c->in), free(c->out);
  memset(c, 0, sizeof *c);
  close(fd);
}

static void give(int fd, const char *bytes, size_t len) {  // hand bytes to the kernel; what it does not take is kept
  Connection *c = &connections[fd];
  if (c->out_len == c->out_at) {
    ssize_t sent = send(fd, bytes, len, MSG_NOSIGNAL);
    if (sent == (ssize_t)len) return;
    if (sent < 0 && errno != EAGAIN) return;
    if (sent > 0) bytes += sent, len -= sent;
    blocked++;
    c->out_at = c->out_len = 0;
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, fd, &e);
  }
  if (c->out_len + len > c->out_size) c->out = realloc(c->out, c->out_size = 2 * (c->out_len + len));
  memcpy(c->out + c->out_len, bytes, len);
  c->out_len += len;
}

static void give_on(int fd) {
  Connection *c = &connections[fd];
  ssize_t sent = send(fd, c->out + c->out_at, c->out_len - c->out_at, MSG_NOSIGNAL);
  if (sent > 0) c->out_at += sent;
  if (c->out_at == c->out_len) {
    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, fd, &e);
  }
}

static void answer_json(int fd, const char *body) {
  char text[8192];
  int len = snprintf(text, sizeof text, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", strlen(body), body);
  give(fd, text, len);
}

static int64_t waited_ns(void) {  // for a core that others had, since the start; 0 where the kernel does not say
  long long on_core = 0, waited = 0;
  FILE *file = fopen("/proc/self/schedstat", "r");
  if (!file) return 0;
  if (fscanf(file, "%lld %lld", &on_core, &waited) != 2) waited = 0;
  fclose(file);
  return waited;
}

static void answer_truth(int fd) {
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  char body[2048];
  snprintf(body, sizeof body,
           "{\"events\": %ld, \"streams\": %ld, \"blocked\": %ld, \"late_p50_us\": %ld, \"late_p99_us\": %ld, \"late_max_us\": %ld, "
           "\"ttft_p50_us\": %ld, \"ttft_p99_us\": %ld, \"itl_p50_us\": %ld, \"itl_p99_us\": %ld, \"cpu_s\": %.6f, "
           "\"seconds\": %.6f, \"busy_s\": %.6f, \"waited_s\": %.6f}",
           events, streams, blocked, percentile(late_us, 0.5), percentile(late_us, 0.99), percentile(late_us, 1.0), percentile(ttft_us, 0.5),
           percentile(ttft_us, 0.99), percentile(itl_us, 0.5), percentile(itl_us, 0.99),
           used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6,
           (now_ns() - counted_from_ns) / 1e9, busy_ns / 1e9, (waited_ns() - waited_before_ns) / 1e9);
  answer_json(fd, body);
}

static void reset(int fd) {
  memset(late_us, 0, sizeof late_us), memset(ttft_us, 0, sizeof ttft_us), memset(itl_us, 0, sizeof itl_us);
  events = streams = blocked = busy_ns = 0;
  counted_from_ns = now_ns(), waited_before_ns = waited_ns();
  answer_json(fd, "{}");
}

static int number_of(const char *body, const char *key, int otherwise) {
  const char *at = strstr(body, key);
  if (!at) return otherwise;
  at = strchr(at + strlen(key), ':');
  int value = at ? atoi(at + 1) : 0;
  return value > 0 ? value : otherwise;
}

static int streams_asked(const char *body) {
  const char *at = strstr(body, "\"stream\"");
  if (!at || !(at = strchr(at, ':'))) return 0;
  while (*++at == ' ') {}
  return !strncmp(at, "true", 4);
}

static const char *date(void) {  // made once a second
  static char text[64];
  static time_t of;
  time_t now = time(NULL);
  if (now != of) of = now, strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", gmtime(&now));
  return text;
}

static void answer(int fd, char *head, char *body, int64_t read_ns) {
  Connection *c = &connections[fd];
  if (!strncmp(head, "GET /truth", 10)) return answer_truth(fd);
  if (!strncmp(head, "POST /reset", 11)) return reset(fd);
  if (strncmp(head, "POST /v1/", 9)) {
    answer_json(fd, "{\"object\": \"list\", \"data\": [{\"id\": \"truth\", \"object\": \"model\", \"owned_by\": \"kilocopy\", \"root\": \"truth\", \"max_model_len\": 8192}]}");
    return;
  }
  c->chat = !strncmp(head, "POST /v1/chat", 13);
  c->tokens = number_of(body, "\"max_tokens\"", number_of(body, "\"max_completion_tokens\"", default_tokens));
  if (!streams_asked(body)) {
    answer_json(fd, c->chat ? "{\"choices\": [{\"index\": 0, \"message\": {\"role\": \"assistant\", \"content\": \"a\"}, \"finish_reason\": \"length\"}], \"usage\": {\"prompt_tokens\": 1, \"completion_tokens\": 1, \"total_tokens\": 2}}"
                            : "{\"choices\": [{\"index\": 0, \"text\": \"a\", \"finish_reason\": \"length\"}], \"usage\": {\"prompt_tokens\": 1, \"completion_tokens\": 1, \"total_tokens\": 2}}");
    return;
  }
  // As vLLM behind Ray Serve was seen to answer completions: the request's own id stands in the head and in each event.
  snprintf(c->id, sizeof c->id, "%08lx-90a1-4038-a836-563cc13f00ca", (unsigned long)(answered++ & 0xffffffff));
  char start[512];
  int len = snprintf(start, sizeof start, "HTTP/1.1 200 OK\r\ndate: %s\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\nvary: Origin\r\n"
                     "x-request-id: %s\r\ntransfer-encoding: chunked\r\n\r\n", date(), c->id);
  give(fd, start, len);
  c->streaming = 1, c->token = 0, c->read_ns = read_ns, c->due_ns = read_ns + ttft_ns;
  streams++;
  heap_add(fd);
}

static void take(int fd) {  // read what is there, and answer each whole request
  Connection *c = &connections[fd];
  ssize_t got = recv(fd, c->in + c->in_len, IN_BYTES - 1 - c->in_len, 0);
  if (got == 0 || (got < 0 && errno != EAGAIN)) return hang_up(fd);
  if (got < 0) return;
  int64_t read_ns = now_ns();
  c->in_len += got, c->in[c->in_len] = 0;
  char *end = strstr(c->in, "\r\n\r\n");
  if (!end) return;
  char *length = strcasestr(c->in, "content-length:");
  size_t body_len = length && length < end ? atoi(length + 15) : 0, whole = end + 4 - c->in + body_len;
  if (c->in_len < whole) return;
  c->in[whole] = 0;
  answer(fd, c->in, end + 4, read_ns);
  c->in_len = 0;  // clients of a closed loop send nothing before they have their answer
}

static void send_usage(int fd, int tokens) {
  char payload[512], chunk[1024];
  int chat = connections[fd].chat;
  int len = snprintf(payload, sizeof payload,
                     "data: {\"id\":\"%scmpl-%s\",\"object\":\"%s\",\"created\":1760000000,\"model\":\"truth\",\"choices\":[],"
                     "\"usage\":{\"prompt_tokens\":8,\"total_tokens\":%d,\"completion_tokens\":%d}}\n\ndata: [DONE]\n\n",
                     chat ? "chat" : "", connections[fd].id, chat ? "chat.completion.chunk" : "text_completion", tokens + 8, tokens);
  len = snprintf(chunk, sizeof chunk, "%x\r\n%s\r\n0\r\n\r\n", len, payload);
  give(fd, chunk, len);
}

static void send_due(int fd) {
  Connection *c = &connections[fd];
  int last = c->token == c->tokens - 1;
  int64_t sent_ns = now_ns();
  Event *event = last ? &last_events[c->chat] : &text_events[c->chat];
  memcpy(event->bytes + event->id_at, c->id, ID_LEN);
  give(fd, event->bytes, event->len);
  count(late_us, sent_ns - c->due_ns);
  if (c->token == 0) count(ttft_us, sent_ns - c->read_ns); else count(itl_us, sent_ns - c->sent_ns);
  c->sent_ns = sent_ns, c->token++, events++;
  if (last) {
    send_usage(fd, c->tokens);
    c->streaming = 0;
    heap_remove(fd);
  } else {
    c->due_ns += itl_ns;
    sift_down(place[fd]);
  }
}

static Event event(const char *format, const char *finish) {
  char payload[1024];
  int n = snprintf(payload, sizeof payload, format, NO_ID, finish);
  Event made = {malloc(1200), 0, 0};
  made.len = snprintf(made.bytes, 1200, "%x\r\n%s\r\n", n, payload);
  made.id_at = strstr(made.bytes, NO_ID) - made.bytes;
  return made;
}

static void prepare(void) {
  const char *completion = "data: {\"id\":\"cmpl-%s\",\"object\":\"text_completion\",\"created\":1760000000,\"model\":\"truth\",\"choices\":"
                           "[{\"index\":0,\"text\":\" word\",\"logprobs\":null,\"finish_reason\":%s,\"stop_reason\":null,\"prompt_token_ids\":null,\"token_ids\":null}]}\n\n";
  const char *chat = "data: {\"id\":\"chatcmpl-%s\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,\"model\":\"truth\",\"choices\":"
                     "[{\"index\":0,\"delta\":{\"content\":\" word\"},\"logprobs\":null,\"finish_reason\":%s}],\"usage\":null}\n\n";
  text_events[0] = event(completion, "null"), last_events[0] = event(completion, "\"length\"");
  text_events[1] = event(chat, "null"), last_events[1] = event(chat, "\"length\"");
}

static void welcome(void) {
  for (;;) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
    if (fd < 0) return;
    if (fd >= CONNECTIONS_MAX) { close(fd); continue; }
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    connections[fd].open = 1, connections[fd].in = malloc(IN_BYTES);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
  }
}

int main(int argc, char **argv) {
  if (argc != 5 && argc != 6) return fprintf(stderr, "server PORT TTFT_US ITL_US TOKENS [own]\n"), 2;
  own_core = argc == 6;
  ttft_ns = atoll(argv[2]) * 1000, itl_ns = atoll(argv[3]) * 1000, default_tokens = atoi(argv[4]);
  signal(SIGPIPE, SIG_IGN);
  prctl(PR_SET_TIMERSLACK, 1);
  struct rlimit files = {CONNECTIONS_MAX, CONNECTIONS_MAX};
  setrlimit(RLIMIT_NOFILE, &files);
  listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  int one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  setsockopt(listener, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);  // where bbr is the default, its pacing would hold events back and cost a timer each
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8192)) return perror("listen"), 1;
  socklen_t size = sizeof address;
  getsockname(listener, (struct sockaddr *)&address, &size);
  prepare();
  epoll_fd = epoll_create1(0);
  struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, ready[1024];
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
  printf("%d\n", ntohs(address.sin_port)), fflush(stdout);
  for (;;) {
    int64_t left_ns = heap_len ? connections[heap[0]].due_ns - now_ns() : 100000000;
    // On a core of its own it never sleeps; on a shared one it sleeps until what is due next, and leaves the core to its clients.
    struct timespec nap = {0, left_ns <= 0 || (own_core && heap_len) ? 0 : left_ns < 100000000 ? left_ns : 100000000};
    int n = epoll_pwait2(epoll_fd, ready, 1024, &nap, NULL), sent = 0;
    int64_t woken_ns = now_ns();
    for (int i = 0; i < n; i++) {
      int fd = ready[i].data.fd;
      if (fd == listener) { welcome(); continue; }
      if (!connections[fd].open) continue;
      if (ready[i].events & EPOLLOUT) give_on(fd);
      if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) take(fd);
    }
    int64_t t = now_ns();
    for (; heap_len && connections[heap[0]].due_ns <= t && sent < 256; sent++) send_due(heap[0]);
    if (n > 0 || sent) busy_ns += now_ns() - woken_ns;
  }
}
