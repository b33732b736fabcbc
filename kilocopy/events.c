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

// The value of a JSON string from quote to quote that is not empty and has no \u in it. NULL, without an exception, for anything else.
static PyObject *text_of(const unsigned char *at, Py_ssize_t len) {
  if (len < 3 || at[0] != '"' || at[len - 1] != '"') return NULL;
  static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
  char small[256], *copy = NULL;
  Py_ssize_t said = 0;
  for (Py_ssize_t i = 1; i < len - 1; i++) {
    unsigned char c = at[i];
    if (c < 0x20 || c == '"') return NULL;
    if (c == '\\') {
      const char *name = ++i < len - 1 ? memchr(names, at[i], sizeof names - 1) : NULL;
      if (!name || len > (Py_ssize_t)sizeof small) return NULL;
      if (!copy) copy = small, memcpy(copy, at + 1, said);
      c = values[name - names];
    }
    if (copy) copy[said] = c;
    said++;
  }
  PyObject *text = PyUnicode_DecodeUTF8(copy ? copy : (const char *)at + 1, said, "strict");
  if (!text) PyErr_Clear();
  return text;
}

// texts(payloads, begin, left, right): the texts of the payloads from `begin` on that are left, a JSON string as `text_of` reads it, right;
// up to the first that is not.
PyObject *events_texts(PyObject *module, PyObject *args) {
  (void)module;
  PyObject *payloads;
  Py_ssize_t begin, left_len, right_len;
  const char *left, *right;
  if (!PyArg_ParseTuple(args, "O!ny#y#", &PyList_Type, &payloads, &begin, &left, &left_len, &right, &right_len)) return NULL;
  PyObject *texts = PyList_New(0);
  for (Py_ssize_t index = begin; texts && index < PyList_GET_SIZE(payloads); index++) {
    char *at;
    Py_ssize_t len;
    if (PyBytes_AsStringAndSize(PyList_GET_ITEM(payloads, index), &at, &len)) return Py_DECREF(texts), NULL;
    if (len < left_len + right_len || memcmp(at, left, left_len) || memcmp(at + len - right_len, right, right_len)) break;
    PyObject *text = text_of((unsigned char *)at + left_len, len - left_len - right_len);
    if (!text) break;
    if (append(texts, text)) return Py_DECREF(texts), NULL;
  }
  return texts;
}
