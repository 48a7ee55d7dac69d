"use strict";
/*
 * From logits to text: generate.py in JavaScript, with its names. The page draws with nextTokenProbs what the worker
 * draws from, so what the bars show is what happens.
 */

/**
 * The distribution to draw the next token from: logits (V) -> probabilities (V).
 *
 * temperature: below 1 prefers the likely tokens more, above 1 less; 0 gives all to the likeliest. topK: only the k
 * likeliest stay; 0 keeps all. topP: of those, only the fewest likeliest that together reach p. In that order.
 */
function nextTokenProbs(logits, { temperature = 1, topK = 0, topP = 1 } = {}) {
  const V = logits.length;
  const probs = new Float64Array(V);
  const likeliest = highest(logits);
  if (temperature < 1e-5) {
    probs[likeliest] = 1;
    return probs;
  }
  let sum = 0;
  for (let i = 0; i < V; i++) sum += probs[i] = Math.exp((logits[i] - logits[likeliest]) / temperature);
  const someStay = topK > 0 && topK < V;
  if (someStay || topP < 1) {
    const kept = someStay ? mostProbable(probs, topK) : byProbability(probs);
    const left = kept.reduce((total, i) => total + probs[i], 0);
    let before = 0; // the share of all that are likelier
    const nucleus = kept.filter((i) => {
      const stays = before < topP || before === 0;
      before += probs[i] / left;
      return stays;
    });
    const stays = new Set(nucleus);
    sum = 0;
    for (let i = 0; i < V; i++) sum += probs[i] = stays.has(i) ? probs[i] : 0;
  }
  for (let i = 0; i < V; i++) probs[i] /= sum;
  return probs;
}

/** The tokens from the likeliest to the least likely; of equals the first one first. */
function byProbability(probs) {
  return Array.from(probs.keys()).sort((a, b) => probs[b] - probs[a] || a - b);
}

/** The n likeliest of them, in that order, in one pass. */
function mostProbable(probs, n) {
  const best = [];
  for (let i = 0; i < probs.length; i++) {
    if (best.length === n && !(probs[i] > probs[best[n - 1]])) continue;
    let place = best.length;
    while (place > 0 && probs[i] > probs[best[place - 1]]) place--;
    best.splice(place, 0, i);
    if (best.length > n) best.pop();
  }
  return best;
}

function highest(numbers) {
  let best = 0;
  for (let i = 1; i < numbers.length; i++) if (numbers[i] > numbers[best]) best = i;
  return best;
}

/** Draw one token from probabilities (V). */
function pick(probs, random = Math.random) {
  let left = random();
  for (let i = 0; i < probs.length; i++) {
    left -= probs[i];
    if (left < 0 && probs[i] > 0) return i;
  }
  return highest(probs); // the probabilities summed to a little less than 1
}

/** How many bits of surprise a token is: 0 where it was certain, one more for each halving of its probability. */
function surprise(logits, token) {
  const top = logits[highest(logits)];
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i] - top);
  return (Math.log(sum) - (logits[token] - top)) / Math.LN2;
}

/**
 * Reads a text that grows, and gives the logits of what comes next. As generate.py's Reader: of a longer prompt the
 * last block_size tokens count, and each time the window is full, it goes on with its newest half.
 */
class Reader {
  constructor(model) {
    this.model = model;
    this.block_size = model.config.block_size;
    this.cache = model.newCache();
    this.start = null; // where in the text the window begins
    this.read = []; // the window's tokens that are in the cache
  }

  /**
   * The logits (V) of what follows text (N tokens).
   *
   * onLogits(position, logits) is called for each position from `from` on: logits of what follows it.
   */
  nextLogits(text, from = text.length - 1, onLogits = () => {}) {
    const N = text.length;
    if (this.start === null || N <= this.start) this.start = Math.max(0, N - this.block_size);
    else if (N - this.start > this.block_size) this.start = N - Math.max(1, Math.floor(this.block_size / 2));
    return this.readWindow(text, this.start, N, from, onLogits);
  }

  /** Read text[start..end). What the cache has of it is not read again, but for the positions from `from` on. */
  readWindow(text, start, end, from = end - 1, onLogits = () => {}) {
    const V = this.model.config.vocab_size;
    const window = text.slice(start, end);
    let known = 0;
    while (known < Math.min(this.read.length, window.length) && this.read[known] === window[known]) known++;
    this.cache.length = Math.max(0, Math.min(known, from - start));
    this.start = start;
    this.read = window;
    let last = null;
    while (this.cache.length < window.length) {
      const first = this.cache.length;
      const chunk = window.slice(first, first + CHUNK);
      const logits = this.model.forward(chunk, this.cache); // (T, V)
      chunk.forEach((_, t) => {
        last = logits.subarray(t * V, (t + 1) * V);
        if (start + first + t >= from) onLogits(start + first + t, last);
      });
    }
    return last;
  }

  /** Read the last `rows` tokens of text[start..end) once more and hand over what happened: onRecord(record, logits). */
  watch(text, start, end, rows, onRecord) {
    const window = text.slice(start, end);
    if (this.start !== start || window.some((token, i) => token !== this.read[i])) this.readWindow(text, start, end);
    const { length } = this.cache; // of what lies behind, keys and values stay where they are
    this.cache.length = window.length - rows;
    while (this.cache.length < window.length) {
      const record = {};
      const chunk = window.slice(this.cache.length, this.cache.length + CHUNK);
      onRecord(record, this.model.forward(chunk, this.cache, record));
    }
    this.cache.length = length;
  }

  /** Another reader that has read the same. */
  copy() {
    const other = new Reader(this.model);
    other.cache.copyFrom(this.cache);
    return Object.assign(other, { start: this.start, read: this.read });
  }
}

/**
 * The `width` most probable continuations of text by `length` tokens that a beam search finds, best first.
 *
 * Returns {beams: [{tokens, logProb}], steps}. steps: for each depth the candidates that were considered, likeliest
 * first, [{parent, token, logProb, kept}], where parent is the place of the beam it extends among those kept before.
 */
function beamSearch(reader, text, length, width) {
  let beams = [{ tokens: [], logProb: 0, reader }];
  const steps = [];
  for (let depth = 0; depth < length; depth++) {
    const candidates = [];
    beams.forEach((beam, parent) => {
      const logits = beam.reader.nextLogits([...text, ...beam.tokens]);
      const probs = nextTokenProbs(logits);
      for (const token of mostProbable(probs, 2 * width)) {
        candidates.push({ parent, token, logProb: beam.logProb + Math.log(probs[token]) });
      }
    });
    candidates.sort((a, b) => b.logProb - a.logProb);
    steps.push(candidates.slice(0, 2 * width).map((candidate, rank) => ({ ...candidate, kept: rank < width })));
    const kept = candidates.slice(0, width);
    // The last child of a beam takes over its reader, the others get copies.
    beams = kept.map(({ parent, token, logProb }, i) => {
      const isLast = !kept.slice(i + 1).some((other) => other.parent === parent);
      const own = beams[parent];
      return { tokens: [...own.tokens, token], logProb, reader: isLast ? own.reader : own.reader.copy() };
    });
  }
  return { beams: beams.map(({ tokens, logProb }) => ({ tokens, logProb })), steps };
}
