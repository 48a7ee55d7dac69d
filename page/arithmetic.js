"use strict";
/*
 * The one operation that takes nearly all of the time, a matrix product, in two forms that agree to rounding.
 *
 *     new PlainArithmetic(bytes)   JavaScript alone: works everywhere, shows what is computed
 *     new SimdArithmetic(bytes)    sixteen products at a time (WebAssembly SIMD), several times as fast
 *
 * Both hand out arrays from one block of memory: array(n) gives a Float32Array of n numbers. Their
 * matmul(y, w, x, T, rows, cols) computes y (T, rows) = x (T, cols) times the transpose of w (rows, cols), which is
 * what a PyTorch Linear does. Arrays are flat, row after row.
 */

class PlainArithmetic {
  constructor(bytes) {
    this.buffer = this.allocate(bytes);
    this.used = 0;
  }

  get name() {
    return "plain JavaScript";
  }

  allocate(bytes) {
    return new ArrayBuffer(bytes);
  }

  array(n) {
    const array = new Float32Array(this.buffer, this.used, n);
    this.used += bytesOf(n);
    return array;
  }

  matmul(y, w, x, T, rows, cols) {
    for (let row = 0; row < rows; row++) {
      const from = row * cols; // each row of w is fetched once and serves all T tokens
      for (let t = 0; t < T; t++) y[t * rows + row] = dot(w, from, x, t * cols, cols);
    }
  }
}

/** How much memory array(n) takes: whole steps of 16 bytes, as SIMD reads them. */
function bytesOf(n) {
  return 16 * Math.ceil(n / 4);
}

/** The sum of a[i + k] * b[j + k] for k < n. Four sums side by side do not wait for one another. */
function dot(a, i, b, j, n) {
  let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  const end = i + n - 3;
  for (; i < end; i += 4, j += 4) {
    s0 += a[i] * b[j];
    s1 += a[i + 1] * b[j + 1];
    s2 += a[i + 2] * b[j + 2];
    s3 += a[i + 3] * b[j + 3];
  }
  for (; i < end + 3; i++, j++) s0 += a[i] * b[j];
  return s0 + s1 + (s2 + s3);
}

class SimdArithmetic extends PlainArithmetic {
  get name() {
    return "WebAssembly SIMD";
  }

  allocate(bytes) {
    const memory = new WebAssembly.Memory({ initial: Math.ceil(bytes / 65536) });
    const program = new WebAssembly.Module(simdProgram());
    this.kernel = new WebAssembly.Instance(program, { page: { memory } }).exports.matmul;
    return memory.buffer;
  }

  matmul(y, w, x, T, rows, cols) {
    if (cols % 16 !== 0) return super.matmul(y, w, x, T, rows, cols);
    this.kernel(y.byteOffset, w.byteOffset, x.byteOffset, T, rows, cols);
  }
}

/** Does this browser run the SIMD program? */
function hasSimd() {
  try {
    return WebAssembly.validate(simdProgram());
  } catch {
    return false; // no WebAssembly at all
  }
}

/**
 * matmul as a WebAssembly program, written down instruction by instruction (webassembly.github.io/spec, Binary Format).
 *
 * An expression is a list of bytes that leaves one value; they nest as in Lisp: add(get(x), number(64)).
 */
function simdProgram() {
  const unsigned = (n) => (n < 128 ? [n] : [(n & 127) | 128, ...unsigned(n >> 7)]); // LEB128
  const sized = (bytes) => [...unsigned(bytes.length), ...bytes];
  const list = (items) => [...unsigned(items.length), ...items.flat()];
  const name = (text) => sized([...text].map((c) => c.charCodeAt(0)));
  const section = (id, items) => [id, ...sized(list(items))];

  // Expressions: whole numbers (i32), one float (f32), four floats at once (f32x4).
  const get = (variable) => [0x20, variable];
  const set = (variable, value) => [...value, 0x21, variable];
  const number = (n) => [0x41, n]; // below 64
  const add = (a, b) => [...a, ...b, 0x6a];
  const times = (a, b) => [...a, ...b, 0x6c];
  const isBelow = (a, b) => [...a, ...b, 0x49];
  const load4 = (address, offset) => [...address, 0xfd, 0, 4, offset];
  const add4 = (a, b) => [...a, ...b, 0xfd, 0xe4, 1];
  const times4 = (a, b) => [...a, ...b, 0xfd, 0xe6, 1];
  const zeros4 = () => [...number(0), 0xfd, 0x11];
  const lane = (four, i) => [...four, 0xfd, 0x1f, i];
  const addFloats = (a, b) => [...a, ...b, 0x92];
  const store = (address, value) => [...address, ...value, 0x38, 2, 0];
  const repeatWhile = (condition, ...body) => [0x03, 0x40, ...body.flat(), ...condition, 0x0d, 0, 0x0b];

  const [Y, W, X, T, ROWS, COLS, row, t, w, x, end, s0, s1, s2, s3] = Array(15).keys(); // parameters, then variables
  const bytes = (n) => times(n, number(4)); // of n floats
  const step = (sum, offset) => set(sum, add4(get(sum), times4(load4(get(w), offset), load4(get(x), offset))));
  const body = repeatWhile(
    isBelow(get(row), get(ROWS)),
    set(t, number(0)),
    repeatWhile(
      isBelow(get(t), get(T)),
      set(w, add(get(W), bytes(times(get(row), get(COLS))))),
      set(x, add(get(X), bytes(times(get(t), get(COLS))))),
      set(end, add(get(w), bytes(get(COLS)))),
      ...[s0, s1, s2, s3].map((sum) => set(sum, zeros4())),
      repeatWhile(
        isBelow(get(w), get(end)),
        step(s0, 0), step(s1, 16), step(s2, 32), step(s3, 48),
        set(w, [...get(w), 0x41, 0xc0, 0, 0x6a]), // 64 bytes on
        set(x, [...get(x), 0x41, 0xc0, 0, 0x6a]),
      ),
      set(s0, add4(add4(get(s0), get(s1)), add4(get(s2), get(s3)))),
      store(
        add(get(Y), bytes(add(times(get(t), get(ROWS)), get(row)))),
        addFloats(addFloats(lane(get(s0), 0), lane(get(s0), 1)), addFloats(lane(get(s0), 2), lane(get(s0), 3))),
      ),
      set(t, add(get(t), number(1))),
    ),
    set(row, add(get(row), number(1))),
  );

  const [i32, v128] = [0x7f, 0x7b];
  const variables = list([[5, i32], [4, v128]]);
  return new Uint8Array([
    0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0, // "\0asm", version 1
    ...section(1, [[0x60, ...list(Array(6).fill([i32])), 0]]), // a function of six whole numbers, with no result
    ...section(2, [[...name("page"), ...name("memory"), 2, 0, 1]]), // imports a memory of at least one page
    ...section(3, [[0]]), // one function, of that type
    ...section(7, [[...name("matmul"), 0, 0]]), // exported
    ...section(10, [sized([...variables, ...body, 0x0b])]),
  ]);
}
