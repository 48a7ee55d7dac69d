"use strict";
/*
 * Text to tokens and back, as tokenizer.py does it: by characters, or by byte-pair encoding as in GPT-2.
 *
 *     tokenizer.encode(text)   the tokens; throws an Error that names the characters it does not know
 *     tokenizer.pieces(ids)    what each token adds to the text; all of them joined are the text
 *     tokenizer.label(id)      the token by itself, to be shown in a list
 */

/** spec: {kind: "characters", tokens} or {kind: "bytes", tokens, merges, split, prefixSpace, added}, from export.py. */
function makeTokenizer(spec) {
  return spec.kind === "characters" ? new CharTokenizer(spec) : new ByteTokenizer(spec);
}

/** One token a character. */
class CharTokenizer {
  constructor({ tokens }) {
    this.tokens = tokens;
    this.ids = new Map(tokens.map((char, id) => [char, id]));
  }

  encode(text) {
    const chars = Array.from(text); // by code points, so that an emoji is one
    const strange = [...new Set(chars.filter((char) => !this.ids.has(char)))];
    if (strange.length > 0) {
      const names = strange.slice(0, 5).map((char) => `${visible(char)} (${codePoint(char)})`);
      throw new Error(
        `The model was trained on a text without ${names.join(", ")}${strange.length > 5 ? " ..." : ""}; leave that out.`,
      );
    }
    return chars.map((char) => this.ids.get(char));
  }

  pieces(ids) {
    return ids.map((id) => this.tokens[id] ?? "");
  }

  label(id) {
    return visible(this.tokens[id] ?? `#${id}`);
  }
}

/**
 * Byte-pair encoding (Sennrich et al. 2016; over bytes: Radford et al. 2019, 2.2). Text is split into words, each word
 * into bytes, and then the pair of neighbours that was merged first in training is merged, until none is left.
 */
class ByteTokenizer {
  constructor({ tokens, merges, split, prefixSpace, added }) {
    this.tokens = tokens; // in letters, one for each byte
    this.split = split;
    this.prefixSpace = prefixSpace;
    this.added = new Map(added); // whole words with a token of their own, whatever they consist of: [text, id]
    this.addedTexts = new Map(added.map(([text, id]) => [id, text]));
    this.ids = new Map(tokens.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map((pair, rank) => [pair, rank])); // "left right"
    this.known = new Map(); // words that were encoded before
    this.letters = byteLetters();
    this.bytes = new Map(this.letters.map((letter, byte) => [letter, byte]));
  }

  encode(text) {
    return this.cut(text).flatMap((part) => {
      if (this.added.has(part)) return [this.added.get(part)];
      const spaced = this.prefixSpace && !part.startsWith(" ") ? ` ${part}` : part;
      const words = this.split ? spaced.match(WORDS) : [spaced];
      return words.flatMap((word) => this.encodeWord(word));
    });
  }

  /** The text cut around the added words; of two at one place the longer one counts. */
  cut(text) {
    if (this.added.size === 0) return text === "" ? [] : [text];
    const longestFirst = [...this.added.keys()].sort((a, b) => b.length - a.length);
    const escaped = longestFirst.map((word) => word.replace(/[.*+?^${}()|[\]\\\/-]/g, "\\$&"));
    return text.split(new RegExp(`(${escaped.join("|")})`)).filter((part) => part !== "");
  }

  encodeWord(word) {
    if (!this.known.has(word)) {
      let symbols = Array.from(new TextEncoder().encode(word), (byte) => this.letters[byte]);
      for (;;) {
        const rank = (i) => this.ranks.get(`${symbols[i]} ${symbols[i + 1]}`) ?? Infinity;
        let best = 0;
        for (let i = 1; i < symbols.length - 1; i++) if (rank(i) < rank(best)) best = i;
        if (symbols.length < 2 || rank(best) === Infinity) break;
        symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
      }
      this.known.set(word, symbols.map((symbol) => this.ids.get(symbol)));
    }
    return this.known.get(word);
  }

  bytesOf(id) {
    if (this.addedTexts.has(id)) return new TextEncoder().encode(this.addedTexts.get(id));
    return Uint8Array.from(this.tokens[id] ?? "", (letter) => this.bytes.get(letter));
  }

  /** A character that takes several tokens belongs to the last of them. */
  pieces(ids) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return ids.map((id, i) => decoder.decode(this.bytesOf(id), { stream: i < ids.length - 1 }));
  }

  label(id) {
    const bytes = this.bytesOf(id);
    if (bytes.length === 0) return `#${id}`;
    try {
      return visible(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes));
    } catch {
      return Array.from(bytes, (byte) => `‹${byte.toString(16).padStart(2, "0")}›`).join(""); // a part of a character
    }
  }
}

// GPT-2's words: a contraction, letters, digits or signs, each with the space before it, or a run of white space.
const WORDS =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

/** A letter for each of the 256 bytes, such that none is white space: those that print stand for themselves. */
function byteLetters() {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const prints = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    return String.fromCodePoint(prints ? byte : next++);
  });
}

/** A text with signs for what leaves no mark. */
function visible(text) {
  const signs = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
  return Array.from(text, (char) => signs[char] ?? (/[\p{C}\p{Z}]/u.test(char) ? codePoint(char) : char)).join("");
}

function codePoint(char) {
  return `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}
