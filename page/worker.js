"use strict";
/*
 * The model, in a thread of its own, so that the page never has to wait for it. The page sends {id, question, ...} and
 * gets {id, answer} or {id, error}. Every question brings the whole text along as tokens: nothing here can disagree
 * with the page, and the reader finds out by itself what of the text is new.
 */

const TOLERANCE = 0.002; // bits by which a token's surprise may differ from Python's: rounding stays far below that
const MAP_SIDE = 96; // the most tokens in a picture of a head

let model = null;
let reader = null; // of the text's end
let lookBack = null; // a second one, of places that the first one's window has left behind

const answers = {
  /** Unpack the weights, choose the arithmetic, and compare what it computes with what Python computed. */
  load({ header, base64, simd }) {
    model = readModel(header, base64, simd && hasSimd() ? SimdArithmetic : PlainArithmetic);
    reader = new Reader(model);
    lookBack = new Reader(model);
    const { tokens, bits } = header.check;
    const isRight = bits.map(() => false);
    lookBack.readWindow(tokens, 0, bits.length, 0, (position, logits) => {
      isRight[position] = Math.abs(surprise(logits, tokens[position + 1]) - bits[position]) < TOLERANCE;
    });
    return { arithmetic: model.arithmetic.name, hasSimd: hasSimd(), isPythons: isRight.every(Boolean) };
  },

  /**
   * The surprise of the tokens from position `from` on: [{position, bits, start}]. Each is seen from half a window or
   * more (fewer where the text has no more), as it would be in writing; start: where that window begins.
   */
  read({ tokens, from }) {
    const found = [];
    const note = (position, logits, { start }) => {
      const next = position + 1;
      const isSeenWell = start === 0 || next - start >= half;
      if (next < tokens.length && isSeenWell) found.push({ position: next, bits: surprise(logits, tokens[next]), start });
    };
    const half = Math.max(1, Math.floor(reader.block_size / 2));
    const first = Math.max(1, from); // nothing predicts the very first token
    reader.nextLogits(tokens, first - 1, (position, logits) => note(position, logits, reader));
    const last = reader.start === 0 ? 0 : reader.start + half - 1; // of those that need another window
    for (let next = first; next <= last; ) {
      const start = Math.max(0, next - half);
      const end = Math.min(start + reader.block_size, last);
      lookBack.readWindow(tokens, start, end, next - 1, (position, logits) => note(position, logits, lookBack));
      next = end + 1;
    }
    return { found, start: reader.start };
  },

  /** Write up to `count` tokens, or as many as `ms` milliseconds allow: [{id, bits, start}]. */
  write({ tokens, count, ms, settings }) {
    const until = performance.now() + ms;
    const text = [...tokens];
    const written = [];
    do {
      const logits = reader.nextLogits(text);
      const id = pick(nextTokenProbs(logits, settings));
      written.push({ id, bits: surprise(logits, id), start: reader.start });
      text.push(id);
    } while (written.length < count && performance.now() < until);
    return { written };
  },

  /**
   * What went on when the token at `position` was due, in the window that began at `start`; null: where the reader has
   * it for the token to come. The answer: that start, the logits (V), each layer's attention from the token before it,
   * [layer] -> (H, S), and the logit lens, what the stream says as it enters the first layer and after each: the
   * likeliest tokens [{id, probability}].
   */
  inspect({ tokens, position, start, most }) {
    if (start === null) {
      reader.nextLogits(tokens);
      start = reader.start;
    }
    const answer = { start };
    readerAt(start).watch(tokens, start, position, 1, ({ attention, stream }, logits) => {
      answer.logits = logits.slice(-model.config.vocab_size);
      answer.attention = attention;
      answer.lens = stream.map((x) => {
        const probs = nextTokenProbs(model.head(x, 1));
        return mostProbable(probs, most).map((id) => ({ id, probability: probs[id] }));
      });
    });
    return answer;
  },

  /** How the last tokens before `position` look at each other: {side, maps: [layer][head] -> (side, side)}. */
  heads({ tokens, position, start }) {
    const { n_head: H, n_layer } = model.config;
    const S = position - start;
    const side = Math.min(S, MAP_SIDE);
    const maps = Array.from({ length: n_layer }, () => Array.from({ length: H }, () => new Float32Array(side * side)));
    let row = 0; // in the pictures
    readerAt(start).watch(tokens, start, position, side, ({ attention }) => {
      const seen = S - side + row; // before these T tokens
      const T = Math.min(CHUNK, side - row);
      attention.forEach((weights, layer) => { // (H, T, seen + T)
        for (let head = 0; head < H; head++) {
          for (let t = 0; t < T; t++) {
            const from = (head * T + t) * (seen + T);
            maps[layer][head].set(weights.subarray(from + S - side, from + seen + T), (row + t) * side);
          }
        }
      });
      row += T;
    });
    return { side, maps };
  },

  beams({ tokens, length, width }) {
    return beamSearch(reader.copy(), tokens, length, width);
  },

  /** The logits (N, V) of a whole text, for those who want to compare them with Python's. */
  logits({ tokens }) {
    const all = [];
    new Reader(model).readWindow(tokens, 0, tokens.length, 0, (_, logits) => all.push(...logits));
    return { logits: Float32Array.from(all) };
  },
};

function readerAt(start) {
  return start === reader.start ? reader : lookBack;
}

onmessage = ({ data: { id, question, ...details } }) => {
  try {
    postMessage({ id, answer: answers[question](details) });
  } catch (error) {
    postMessage({ id, error: String(error.message ?? error) });
  }
};
