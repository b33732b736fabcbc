// The reader's hot path: reads every ready socket of an epoll set, notes when each read came, and follows the chunks of HTTP/1.1 bodies
// far enough to know that nothing but whole plain chunks came. The rest is Python's (loadtests/streams.py): heads, ends, errors, limits,
// and every body that is not of this form are handed to llhttp there, read by read, as if this file did not exist.
//
// A line (one a file descriptor) keeps the raw bytes of its answer and the end and time of each read. Of these, `whole_to` is where the
// first chunk begins that is not complete: size in at most 7 hex digits and not 0, CRLF, data, CRLF.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>

enum { READ_BYTES = 65536, PASS_MAX = 128, KEPT_BYTES = 65536, KEPT_READS = 4096, HEX_DIGITS_MAX = 7 };
enum { ON = 0, SEE = 1, CLOSED = 2 };  // what a read says, as in kilocopy/drain.py; a negative number is -errno
enum { NOT_OURS = 3 };                 // a socket without a line: whoever asked reads it
enum { FAILED = -(1 << 20) };          // with a Python exception: memory is out

// While reads bring more than one event, more are let gather before the next: a wake-up costs about as much as reading an event. With the
// kernel's timer slack of 50 us a sleep is of some 0.1 ms; an event may wait that long and for the reads of those before it.
static const struct timespec GATHER = {.tv_nsec = 50000};

typedef struct {
  Py_ssize_t end;
  int64_t ns;
} Read;

typedef struct {
  int open;
  char *raw;
  Py_ssize_t len, size, whole_to, bytes_left, pieces_left;
  Read *reads;
  Py_ssize_t read_count, read_size;
} Line;

typedef struct {
  PyObject_HEAD
  int epoll_fd, line_count;
  Line *lines;
  char *buffer;
} Drain;

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);  // what time.perf_counter_ns reads
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static Line *line_of(Drain *self, int fd) { return fd >= 0 && fd < self->line_count && self->lines[fd].open ? &self->lines[fd] : NULL; }

// Where the data of the chunk at `at` begins, and its size. 0: its first line is not complete yet; -1: no plain chunk, or the last.
static Py_ssize_t chunk_data(const char *raw, Py_ssize_t at, Py_ssize_t len, Py_ssize_t *size) {
  Py_ssize_t value = 0, digits = 0;
  for (; at < len; at++, digits++) {
    int c = (unsigned char)raw[at], low = c | 32;
    int digit = c >= '0' && c <= '9' ? c - '0' : low >= 'a' && low <= 'f' ? low - 'a' + 10 : -1;
    if (digit < 0) break;
    if (digits == HEX_DIGITS_MAX) return -1;
    value = value * 16 + digit;
  }
  if (at == len) return 0;
  if (raw[at] != '\r' || !value) return -1;
  if (at + 1 == len) return 0;
  if (raw[at + 1] != '\n') return -1;
  *size = value;
  return at + 2;
}

// Go over the chunks that are complete now. Returns whether Python has to see what comes next.
static int follow(Line *line) {
  for (;;) {
    Py_ssize_t size = 0, data = chunk_data(line->raw, line->whole_to, line->len, &size);
    if (data < 0) return SEE;
    if (data == 0 || line->len <= data + size) break;
    if (line->raw[data + size] != '\r') return SEE;
    if (line->len == data + size + 1) break;
    if (line->raw[data + size + 1] != '\n') return SEE;
    line->whole_to = data + size + 2;
    line->pieces_left--;
  }
  return line->bytes_left < 0 || line->pieces_left < line->read_count ? SEE : ON;
}

static int grow(void **kept, Py_ssize_t *size, Py_ssize_t wanted, size_t each) {
  if (wanted <= *size) return 0;
  Py_ssize_t larger = *size ? *size : 64;
  while (larger < wanted) larger *= 2;
  void *moved = PyMem_RawRealloc(*kept, (size_t)larger * each);
  if (!moved) return PyErr_NoMemory(), -1;
  *kept = moved, *size = larger;
  return 0;
}

static int keep(Line *line, const char *data, Py_ssize_t len, int64_t ns) {  // -1 with an exception where memory is out
  if (grow((void **)&line->raw, &line->size, line->len + len, 1)) return -1;
  if (grow((void **)&line->reads, &line->read_size, line->read_count + 1, sizeof(Read))) return -1;
  memcpy(line->raw + line->len, data, len);
  line->len += len, line->bytes_left -= len;
  line->reads[line->read_count++] = (Read){line->len, ns};
  return 0;
}

// One read of a socket with a line. Returns ON, SEE, CLOSED, -errno or FAILED.
static int receive(Drain *self, int fd, Line *line, int64_t ns) {
  ssize_t got = recv(fd, self->buffer, READ_BYTES, 0);
  if (got == 0) return CLOSED;
  if (got < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? ON : -errno;
  if (keep(line, self->buffer, got, ns)) return FAILED;
  return follow(line);
}

static void forget(Line *line) {
  line->open = 0, line->len = line->whole_to = line->read_count = 0;
  if (line->size <= KEPT_BYTES && line->read_size <= KEPT_READS) return;  // the next answer will be as long
  PyMem_RawFree(line->raw), PyMem_RawFree(line->reads);
  line->raw = NULL, line->reads = NULL, line->size = line->read_size = 0;
}

// ---------------------------------------------------------------------------------------------------------- what Python calls

static PyObject *drain_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  int epoll_fd;
  if (!PyArg_ParseTuple(args, "i", &epoll_fd)) return NULL;
  Drain *self = (Drain *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->epoll_fd = epoll_fd, self->line_count = 0, self->lines = NULL;
  self->buffer = PyMem_RawMalloc(READ_BYTES);
  if (!self->buffer) return Py_DECREF(self), PyErr_NoMemory();
  return (PyObject *)self;
}

static void drain_dealloc(Drain *self) {
  for (int fd = 0; fd < self->line_count; fd++) PyMem_RawFree(self->lines[fd].raw), PyMem_RawFree(self->lines[fd].reads);
  PyMem_RawFree(self->lines), PyMem_RawFree(self->buffer);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *drain_begin(Drain *self, PyObject *args) {
  int fd;
  const char *data;
  Py_ssize_t len, bytes_left, pieces_left;
  long long ns;
  if (!PyArg_ParseTuple(args, "iy#Lnn", &fd, &data, &len, &ns, &bytes_left, &pieces_left)) return NULL;
  if (fd < 0) return PyErr_SetString(PyExc_ValueError, "no file descriptor"), NULL;
  if (fd >= self->line_count) {
    int count = fd + 256;
    Line *lines = PyMem_RawRealloc(self->lines, count * sizeof(Line));
    if (!lines) return PyErr_NoMemory();
    memset(lines + self->line_count, 0, (count - self->line_count) * sizeof(Line));
    self->lines = lines, self->line_count = count;
  }
  Line *line = &self->lines[fd];
  forget(line);
  line->open = 1, line->bytes_left = bytes_left, line->pieces_left = pieces_left;
  if (len && keep(line, data, len, ns)) return NULL;
  return PyLong_FromLong(follow(line));
}

static PyObject *drain_receive(Drain *self, PyObject *args) {
  int fd;
  long long ns;
  if (!PyArg_ParseTuple(args, "iL", &fd, &ns)) return NULL;
  Line *line = line_of(self, fd);
  int said = line ? receive(self, fd, line, ns) : NOT_OURS;
  return said == FAILED ? NULL : PyLong_FromLong(said);
}

static PyObject *drain_pass(Drain *self, PyObject *args) {
  long long wait_ns;
  if (!PyArg_ParseTuple(args, "L", &wait_ns)) return NULL;
  struct epoll_event ready[PASS_MAX];
  Py_ssize_t events = 0;
  int thick = 0;
  int64_t begun = 0, ns = 0;
  PyObject *seen = PyList_New(0);
  if (!seen) return NULL;
  for (int wait_ms = 0;; wait_ms = 1) {
    int count;
    if (wait_ms) {
      Py_BEGIN_ALLOW_THREADS
      if (thick) nanosleep(&GATHER, NULL);
      count = epoll_wait(self->epoll_fd, ready, PASS_MAX, wait_ms);
      Py_END_ALLOW_THREADS
    } else {
      count = epoll_wait(self->epoll_fd, ready, PASS_MAX, 0);
    }
    ns = now_ns();  // the time first: what is ready now arrived before, whatever it costs to read it all
    if (!begun) begun = ns;
    if (count < 0 && errno != EINTR) return Py_DECREF(seen), PyErr_SetFromErrno(PyExc_OSError);
    for (int i = 0; i < count; i++) {
      int fd = ready[i].data.fd;
      Line *line = line_of(self, fd);
      int said = line ? receive(self, fd, line, ns) : NOT_OURS;
      if (said == FAILED) return Py_DECREF(seen), NULL;
      if (said == ON) continue;
      PyObject *pair = Py_BuildValue("(ii)", fd, said);
      if (!pair || PyList_Append(seen, pair)) return Py_XDECREF(pair), Py_DECREF(seen), NULL;
      Py_DECREF(pair);
    }
    events += count > 0 ? count : 0, thick = count > 1;
    if (count <= 0 || PyList_GET_SIZE(seen) || ns - begun > wait_ns || !wait_ns) break;
  }
  return Py_BuildValue("(nLN)", events, (long long)ns, seen);
}

// The data of the whole chunks, one piece for each chunk and read that it came in, and the times of these reads as native int64.
static int cut(Line *line, PyObject **pieces, PyObject **stamps) {
  Py_ssize_t at = 0, read = 0, count = 0, room = 0, size = 0;
  int64_t *ns = NULL;
  *stamps = NULL;
  if (!(*pieces = PyList_New(0))) return -1;
  while (at < line->whole_to) {
    Py_ssize_t data = chunk_data(line->raw, at, line->whole_to, &size), end = data + size;
    while (data < end) {
      while (line->reads[read].end <= data) read++;
      Py_ssize_t to = line->reads[read].end < end ? line->reads[read].end : end;
      PyObject *piece = PyBytes_FromStringAndSize(line->raw + data, to - data);
      if (!piece || PyList_Append(*pieces, piece)) { Py_XDECREF(piece); goto failed; }
      Py_DECREF(piece);
      if (grow((void **)&ns, &room, count + 1, sizeof *ns)) goto failed;
      ns[count++] = line->reads[read].ns;
      data = to;
    }
    at = end + 2;
  }
  *stamps = PyBytes_FromStringAndSize((char *)ns, count * (Py_ssize_t)sizeof *ns);
failed:
  PyMem_RawFree(ns);
  if (!*stamps) Py_CLEAR(*pieces);
  return *stamps ? 0 : -1;
}

// The bytes after the whole chunks, as they were read: [(bytes, ns)].
static PyObject *rest_of(Line *line) {
  PyObject *rest = PyList_New(0);
  Py_ssize_t at = line->whole_to;
  for (Py_ssize_t read = 0; rest && read < line->read_count; read++) {
    Py_ssize_t end = line->reads[read].end;
    if (end <= at) continue;
    PyObject *pair = Py_BuildValue("(y#L)", line->raw + at, end - at, (long long)line->reads[read].ns);
    if (!pair || PyList_Append(rest, pair)) Py_CLEAR(rest);
    Py_XDECREF(pair);
    at = end;
  }
  return rest;
}

static PyObject *drain_take(Drain *self, PyObject *args) {
  int fd;
  if (!PyArg_ParseTuple(args, "i", &fd)) return NULL;
  Line *line = line_of(self, fd);
  if (!line) return PyErr_SetString(PyExc_KeyError, "no line of this file descriptor"), NULL;
  PyObject *pieces, *stamps, *rest;
  if (cut(line, &pieces, &stamps)) return NULL;
  if (!(rest = rest_of(line))) return Py_DECREF(pieces), Py_DECREF(stamps), NULL;
  Py_ssize_t whole = line->whole_to;
  forget(line);
  return Py_BuildValue("(NNnN)", pieces, stamps, whole, rest);
}

static PyObject *drain_stop(Drain *self, PyObject *args) {
  int fd;
  if (!PyArg_ParseTuple(args, "i", &fd)) return NULL;
  Line *line = line_of(self, fd);
  if (line) forget(line);
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"begin", (PyCFunction)drain_begin, METH_VARARGS, "begin(fd, data, ns, bytes_left, pieces_left): a chunked body begins with data. Returns ON or SEE."},
    {"receive", (PyCFunction)drain_receive, METH_VARARGS, "receive(fd, ns): read once. Returns ON, SEE, CLOSED, NOT_OURS or -errno."},
    {"drain", (PyCFunction)drain_pass, METH_VARARGS,
     "drain(wait_ns): read what is ready, and until wait_ns have passed what becomes so. Returns (events, ns, [(fd, what it said)])."},
    {"take", (PyCFunction)drain_take, METH_VARARGS, "take(fd): the line ends. Returns (pieces, their times, raw bytes of these, [(bytes, ns)] after them)."},
    {"stop", (PyCFunction)drain_stop, METH_VARARGS, "stop(fd): the line, if there is one, ends and what it kept goes."},
    {NULL, NULL, 0, NULL}};

static PyTypeObject drain_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kilocopy._drain.Drain",
    .tp_basicsize = sizeof(Drain),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Drain(epoll_fd): the lines of one epoll set.",
    .tp_new = drain_new,
    .tp_dealloc = (destructor)drain_dealloc,
    .tp_methods = methods,
};

PyObject *events_payloads(PyObject *, PyObject *), *events_texts(PyObject *, PyObject *), *events_gaps(PyObject *, PyObject *);  // events.c

static PyMethodDef functions[] = {
    {"payloads", events_payloads, METH_O, "payloads(pieces): the data of each event and the index of its piece, or None."},
    {"texts", events_texts, METH_VARARGS, "texts(pieces, begin, left, right): the texts of like pieces, joined, and how many they are."},
    {"gaps", events_gaps, METH_O, "gaps(times): microseconds between these, as native uint32."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_drain", "The reader's hot path, compiled.", -1, functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__drain(void) {
  if (PyType_Ready(&drain_type) < 0) return NULL;
  PyObject *made = PyModule_Create(&module);
  if (!made) return NULL;
  Py_INCREF(&drain_type);
  if (PyModule_AddIntConstant(made, "EDITION", 4) < 0) return Py_DECREF(made), NULL;  // as kilocopy/drain.py wants it; one more with each change of what is called
  if (PyModule_AddObject(made, "Drain", (PyObject *)&drain_type) < 0) return Py_DECREF(&drain_type), Py_DECREF(made), NULL;
  return made;
}
