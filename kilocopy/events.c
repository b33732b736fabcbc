// Cuts the body of a stream into its server-sent events and takes the texts out of like ones, for bodies of the plainest form. Anything
// else is left to Python (loadtests/answers.py), which knows every form; what both understand they understand alike.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

static int append(PyObject *list, PyObject *item) {  // takes the reference
  int failed = !item || PyList_Append(list, item);
  Py_XDECREF(item);
  return failed ? -1 : 0;
}

// payloads(pieces): every piece is made of whole events, each one `data: ` line with something in it, LF as line end. Returns
// (payloads, for each the index of its piece as native int64), or None where the pieces are not of this form.
PyObject *events_payloads(PyObject *module, PyObject *pieces) {
  (void)module;
  if (!PyList_Check(pieces)) return PyErr_SetString(PyExc_TypeError, "pieces: a list of bytes"), NULL;
  PyObject *payloads = PyList_New(0), *made = NULL;
  Py_ssize_t count = 0, room = PyList_GET_SIZE(pieces) + 16;
  int64_t *piece_of = PyMem_Malloc(room * sizeof *piece_of);
  if (!payloads || !piece_of) { PyErr_NoMemory(); goto done; }
  for (Py_ssize_t index = 0; index < PyList_GET_SIZE(pieces); index++) {
    char *at, *end;
    Py_ssize_t len;
    if (PyBytes_AsStringAndSize(PyList_GET_ITEM(pieces, index), &at, &len)) goto done;
    for (end = at + len; at < end;) {
      if (end - at < 9 || memcmp(at, "data: ", 6)) goto other;
      char *data = at + 6, *line_end = memchr(data, '\n', end - data);
      if (!line_end || line_end == data || line_end + 1 == end || line_end[1] != '\n' || memchr(data, '\r', line_end - data)) goto other;
      if (append(payloads, PyBytes_FromStringAndSize(data, line_end - data))) goto done;
      if (count == room) {
        int64_t *moved = PyMem_Realloc(piece_of, 2 * room * sizeof *piece_of);
        if (!moved) { PyErr_NoMemory(); goto done; }
        piece_of = moved, room *= 2;
      }
      piece_of[count++] = index;
      at = line_end + 2;
    }
  }
  made = Py_BuildValue("(Oy#)", payloads, (char *)piece_of, count * (Py_ssize_t)sizeof *piece_of);
  goto done;
other:
  made = Py_NewRef(Py_None);
done:
  PyMem_Free(piece_of);
  Py_XDECREF(payloads);
  return made;
}

// Writes the value of a JSON string from quote to quote that is not empty and has no \u in it, at most `len` bytes. Returns its length; -1 for
// anything else.
static Py_ssize_t text_of(const unsigned char *at, Py_ssize_t len, char *out) {
  if (len < 3 || at[0] != '"' || at[len - 1] != '"') return -1;
  static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
  Py_ssize_t said = 0;
  int seen = 0;
  for (Py_ssize_t i = 1; i < len - 1; i++) {
    unsigned char c = at[i];
    if (c < 0x20 || c == '"') return -1;
    if (c == '\\') {
      const char *name = ++i < len - 1 ? memchr(names, at[i], sizeof names - 1) : NULL;
      if (!name) return -1;
      c = values[name - names];
    }
    seen |= c;
    out[said++] = c;
  }
  if (seen < 0x80) return said;
  PyObject *text = PyUnicode_DecodeUTF8(out, said, "strict");  // by itself: two halves of a character do not make it whole
  if (!text) return PyErr_Clear(), -1;
  Py_DECREF(text);
  return said;
}

// texts(pieces, begin, left, right): from `begin` on, pieces that are one event each, its one `data: ` line being left, a JSON string as
// `text_of` reads it, right; up to the first that is not. Returns (the texts, joined, and how many).
PyObject *events_texts(PyObject *module, PyObject *args) {
  (void)module;
  PyObject *pieces, *made = NULL;
  Py_ssize_t begin, left_len, right_len, said = 0, room = 0;
  const char *left, *right;
  char *out = NULL;
  if (!PyArg_ParseTuple(args, "O!ny#y#", &PyList_Type, &pieces, &begin, &left, &left_len, &right, &right_len)) return NULL;
  Py_ssize_t index = begin;
  for (; index < PyList_GET_SIZE(pieces); index++) {
    char *at;
    Py_ssize_t len;
    if (PyBytes_AsStringAndSize(PyList_GET_ITEM(pieces, index), &at, &len)) goto done;
    Py_ssize_t inner = len - 6 - left_len - right_len - 2;
    if (inner < 3 || memcmp(at, "data: ", 6) || memcmp(at + len - 2, "\n\n", 2)) break;
    if (memcmp(at + 6, left, left_len) || memcmp(at + len - 2 - right_len, right, right_len)) break;
    if (room < said + inner) {
      char *moved = PyMem_Realloc(out, room = 2 * (said + inner) + 1024);
      if (!moved) { PyErr_NoMemory(); goto done; }
      out = moved;
    }
    Py_ssize_t more = text_of((unsigned char *)at + 6 + left_len, inner, out + said);
    if (more < 0) break;
    said += more;
  }
  made = Py_BuildValue("(Nn)", PyUnicode_DecodeUTF8(out ? out : "", said, "strict"), index - begin);
done:
  PyMem_Free(out);
  return made;
}

// gaps(times): between successive ones of native int64 nanoseconds, in whole microseconds, as native uint32; what is less or more than that
// holds is its least or most.
PyObject *events_gaps(PyObject *module, PyObject *times) {
  (void)module;
  Py_buffer view;
  if (PyObject_GetBuffer(times, &view, PyBUF_SIMPLE)) return NULL;
  Py_ssize_t count = view.len / 8 > 1 ? view.len / 8 - 1 : 0;
  const int64_t *ns = view.buf;
  PyObject *made = PyBytes_FromStringAndSize(NULL, 4 * count);
  uint32_t *us = made ? (uint32_t *)PyBytes_AS_STRING(made) : NULL;
  for (Py_ssize_t i = 0; us && i < count; i++) {
    int64_t gap = (ns[i + 1] - ns[i]) / 1000;
    us[i] = gap < 0 ? 0 : gap > UINT32_MAX ? UINT32_MAX : (uint32_t)gap;
  }
  PyBuffer_Release(&view);
  return made;
}
