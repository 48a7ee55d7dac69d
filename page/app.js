"use strict";
/*
 * The page: what each control does. The text is a list of tokens; every change makes a new list, so that undo is to go
 * back to the list before. The model runs in a worker (worker.js), which is asked for everything that takes time.
 */

const data = JSON.parse(byId("model-data").textContent);
const tokenizer = makeTokenizer(data.tokenizer);
const label = (id) => tokenizer.label(id);

const SPEEDS = [1, 2, 4, 8, 16, 32, Infinity]; // tokens a second
const LONGEST = 5000; // tokens; a run stops there
const BARS = 12;
const GUESSES = 5; // in a row of the logit lens
const BITS_PER_SHADE = data.header.config.vocab_size > 1000 ? 2 : 1; // more tokens to choose from, more surprise

const state = {
  tokens: [], // [{id, piece, bits, start}]: bits of surprise, and where the window began in which it was predicted;
  //             both null for the first one, which nothing predicted
  history: [], // lists of tokens to go back to
  chosen: null, // the place of a token, or null: the one to come
  windowStart: 0, // what is before is no longer seen
  run: null, // an object while the model writes
  moment: null, // what the worker found at the chosen place
  head: { layer: data.header.config.n_layer - 1, head: 0 },
};

// ---------------------------------------------------------------------------------------------------------------------
// The worker: ask a question, wait for the answer

const questions = new Map();
const worker = startWorker();

function startWorker() {
  const parts = ["arithmetic.js", "model.js", "generate.js", "worker.js"].map((name) => byId(name).textContent);
  const url = URL.createObjectURL(new Blob(parts, { type: "text/javascript" }));
  const started = new Worker(url);
  URL.revokeObjectURL(url);
  started.onmessage = ({ data: { id, answer, error } }) => {
    const { resolve, reject } = questions.get(id);
    questions.delete(id);
    if (error === undefined) resolve(answer);
    else reject(new Error(error));
  };
  return started;
}

let asked = 0;

function ask(question, details = {}) {
  const id = asked++;
  worker.postMessage({ id, question, ...details });
  return new Promise((resolve, reject) => questions.set(id, { resolve, reject }));
}

const ids = (tokens) => tokens.map(({ id }) => id);

// ---------------------------------------------------------------------------------------------------------------------
// Changing the text

/** The text becomes these tokens; undo comes back to what it was. */
function change(tokens) {
  state.history.push(state.tokens);
  show(tokens);
}

/** Draw these tokens as the text. */
function show(tokens) {
  const pieces = tokenizer.pieces(ids(tokens));
  state.tokens = tokens.map((token, i) => (token.piece === pieces[i] ? token : { ...token, piece: pieces[i] }));
  if (state.chosen !== null && state.chosen >= tokens.length) state.chosen = null;
  drawText();
  drawButtons();
}

/** The tokens with the surprise of those from place `from` on, which the model has to read. */
async function withSurprise(tokens, from) {
  const { found, start } = await ask("read", { tokens: ids(tokens), from });
  state.windowStart = start;
  const read = tokens.map((token) => ({ ...token }));
  for (const { position, bits, start } of found) Object.assign(read[position], { bits, start });
  return read;
}

/** Make the text what a person wrote. Raises an Error where it has characters that the model does not know. */
async function setText(text, remember = true) {
  const old = state.tokens;
  const shown = old.map(({ piece }) => piece).join("");
  // What is shown is less than the tokens: a text field has no \r, and a character that is broken is one sign.
  if (text !== "" && text === shown.replace(/\r\n?/g, "\n")) return;
  let wanted = tokenizer.encode(text);
  if (wanted.length === 0) wanted = tokensOfNothing();
  let same = 0;
  while (same < Math.min(old.length, wanted.length) && old[same].id === wanted[same]) same++;
  if (same === old.length && same === wanted.length) return;
  const fresh = wanted.slice(same).map((id) => ({ id, piece: "", bits: null, start: null }));
  const tokens = await withSurprise([...old.slice(0, same), ...fresh], same);
  if (remember) change(tokens);
  else show(tokens);
  look();
}

/** As tokenizer.py's prompt_tokens: an empty text begins with a line break, or the first token there is. */
function tokensOfNothing() {
  try {
    return tokenizer.encode("\n");
  } catch {
    return [0];
  }
}

/** Write some tokens and show them, unless the text was changed meanwhile. Returns how many. */
async function write(count, ms, isWanted) {
  const before = state.tokens;
  const { written } = await ask("write", { tokens: ids(before), count, ms, settings: settings() });
  if (state.tokens !== before || !isWanted()) return 0;
  state.windowStart = written[written.length - 1].start;
  show([...before, ...written.map((token) => ({ ...token, piece: "" }))]);
  return written.length;
}

async function step() {
  state.chosen = null;
  state.history.push(state.tokens);
  const written = await write(1, 0, () => true);
  if (written === 0) state.history.pop();
  look();
}

/** Write until paused, at the chosen speed. */
async function run() {
  const me = (state.run = {});
  const isOn = () => state.run === me;
  state.chosen = null;
  state.history.push(state.tokens);
  drawButtons();
  say("Writing …");
  const began = performance.now();
  let count = 0;
  while (isOn() && state.tokens.length < LONGEST) {
    const turn = performance.now();
    const speed = SPEEDS[byId("speed").value];
    count += await (speed === Infinity ? write(1000, 100, isOn) : write(1, 0, isOn));
    if (!isOn()) break;
    look();
    await new Promise((resolve) => setTimeout(resolve, 1000 / speed - (performance.now() - turn)));
  }
  const seconds = (performance.now() - began) / 1000;
  say(`${count} tokens in ${seconds.toFixed(1)} s, ${Math.round(count / seconds)} a second.${state.tokens.length >= LONGEST ? ` A text ends at ${LONGEST} tokens here.` : ""}`);
  if (isOn()) pause();
}

function pause() {
  state.run = null;
  drawButtons();
  look();
}

function undo() {
  pause();
  show(state.history.pop());
  look();
}

// ---------------------------------------------------------------------------------------------------------------------
// The text and its controls

const text = byId("text");
const nextMark = make("span", { className: "token next", id: "token-next", title: "the token to come" });
nextMark.setAttribute("role", "option");
nextMark.setAttribute("aria-label", "the token to come");
const drawn = []; // the elements of the text: [{element, token}]

/** Bring the elements up to date with state.tokens; what is there already stays. */
function drawText() {
  const { tokens } = state;
  const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
  let same = 0;
  while (same < Math.min(drawn.length, tokens.length) && drawn[same].token === tokens[same]) same++;
  for (const { element } of drawn.splice(same)) element.remove();
  const fresh = tokens.slice(same).map((token, i) => {
    const element = tokenElement(token.piece);
    element.id = `token-${same + i}`;
    element.setAttribute("role", "option");
    element.setAttribute("aria-label", `${label(token.id)}${token.bits === null ? "" : `, ${bitsInWords(token.bits)} of surprise`}`);
    if (token.bits !== null) {
      element.dataset.shade = surpriseShade(token.bits, BITS_PER_SHADE);
      element.title = `${label(token.id)}   ${percent(2 ** -token.bits)}, ${bitsInWords(token.bits)}`;
    }
    element.classList.toggle("left-behind", same + i < leftBehind);
    drawn.push({ element, token });
    return element;
  });
  text.append(...fresh, nextMark);
  drawWindow();
  drawChoice();
  if (atEnd) text.scrollTop = text.scrollHeight;
}

let leftBehind = 0; // so many tokens are faded, as the window has left them

/** Fade what the window has left behind; of a long text only those few elements are touched that change. */
function drawWindow() {
  const [first, last] = [state.windowStart, leftBehind].sort((a, b) => a - b);
  for (const { element } of drawn.slice(first, last)) element.classList.toggle("left-behind", state.windowStart > leftBehind);
  leftBehind = state.windowStart;
}

/** Mark the chosen token. */
function drawChoice() {
  for (const element of text.querySelectorAll(".chosen")) {
    element.classList.remove("chosen");
    element.setAttribute("aria-selected", "false");
  }
  const element = state.chosen === null ? nextMark : drawn[state.chosen].element;
  element.classList.add("chosen");
  element.setAttribute("aria-selected", "true");
  text.setAttribute("aria-activedescendant", element.id);
  return element;
}

function drawButtons() {
  const running = state.run !== null;
  byId("run").textContent = running ? "Pause" : "Run";
  byId("step").disabled = running;
  byId("undo").disabled = state.history.length === 0;
  byId("moment").setAttribute("aria-live", running ? "off" : "polite"); // a reader would not keep up
  byId("looks-most").setAttribute("aria-live", running ? "off" : "polite");
}

function choose(place) {
  if (state.run) pause();
  state.chosen = place >= state.tokens.length ? null : Math.max(0, place);
  drawChoice().scrollIntoView({ block: "nearest" });
  look();
}

function settings() {
  return {
    temperature: Number(byId("temperature").value),
    topK: TOP_KS[byId("top-k").value],
    topP: Number(byId("top-p").value),
  };
}

// The slider's stops: all tokens at its right end.
const vocabulary = data.header.config.vocab_size;
const TOP_KS = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 100, 200, 500, 1000].filter((k) => k < vocabulary).concat(0);

function drawSettings() {
  const { temperature, topK, topP } = settings();
  byId("temperature-value").textContent = temperature === 0 ? "0: the likeliest" : temperature.toFixed(2);
  byId("top-k-value").textContent = topK === 0 ? "all" : topK;
  byId("top-p-value").textContent = topP === 1 ? "all" : topP.toFixed(2);
  const speed = SPEEDS[byId("speed").value];
  byId("speed-value").textContent = speed === Infinity ? "as fast as it can" : `${speed} a second`;
  byId("top-k").setAttribute("aria-valuetext", byId("top-k-value").textContent);
  byId("speed").setAttribute("aria-valuetext", byId("speed-value").textContent);
  drawMoment();
}

function say(message) {
  byId("status").textContent = message;
}

function complain(message) {
  byId("alert").textContent = message;
  byId("alert").hidden = message === "";
}

// ---------------------------------------------------------------------------------------------------------------------
// Editing

function openEditor() {
  pause();
  const place = state.tokens.slice(0, state.chosen ?? state.tokens.length).map(({ piece }) => piece).join("").length;
  byId("prompt").value = state.tokens.map(({ piece }) => piece).join("");
  setEditing(true);
  byId("prompt").focus();
  byId("prompt").setSelectionRange(place, place);
}

async function closeEditor(event) {
  event?.preventDefault();
  try {
    await setText(byId("prompt").value);
    complain("");
    setEditing(false);
    text.focus();
  } catch (error) {
    complain(error.message);
  }
}

function cancelEditor() {
  complain("");
  setEditing(false);
  text.focus();
}

function setEditing(on) {
  byId("editor").hidden = !on;
  text.hidden = on;
  document.querySelector(".controls").hidden = on;
}

// ---------------------------------------------------------------------------------------------------------------------
// The chosen moment: the panels

const bars = makeBarRows(BARS);
const maps = makeMaps(byId("maps"), data.header.config.n_layer, data.header.config.n_head);

let looking = false;
let lookAgain = false;

/** Ask the worker what went on at the chosen place, and draw it. One question at a time: the newest place wins. */
async function look() {
  if (looking) {
    lookAgain = true;
    return;
  }
  looking = true;
  do {
    lookAgain = false;
    const { tokens, chosen } = state;
    const position = chosen ?? tokens.length;
    const start = chosen === null ? null : tokens[chosen].start;
    state.moment = null;
    if (chosen === null || start !== null) {
      const found = await ask("inspect", { tokens: ids(tokens), position, start, most: GUESSES });
      state.moment = { ...found, tokens, position };
      if (chosen === null && tokens === state.tokens && state.windowStart !== found.start) {
        state.windowStart = found.start;
        drawWindow();
      }
    }
    drawMoment();
    if (!state.run && headsInView) await drawHeads();
  } while (lookAgain);
  looking = false;
}

/** What the token at the moment's place is in the text, or null. */
const tokenThere = () => state.moment.tokens[state.moment.position] ?? null;

function drawMoment() {
  const { moment, chosen, tokens } = state;
  for (const id of ["bars", "looks", "lens-body", "maps"]) byId(id).classList.toggle("empty", moment === null);
  if (moment === null) {
    if (chosen !== null) {
      byId("moment").replaceChildren("The text begins with it, so nothing predicted it: choose a token further on.");
    }
    return;
  }
  const there = tokenThere();
  const before = moment.tokens.slice(Math.max(0, moment.position - 24), moment.position).map(({ piece }) => piece).join("");
  const context = make("b", { textContent: `…${visible(before.slice(-24)).replaceAll("␣", " ")}` });
  byId("moment").replaceChildren("After ", context, ...(there === null ? [" comes:"] : [" came ", make("b", {}, label(there.id)), `: ${percent(2 ** -there.bits)}, ${bitsInWords(there.bits)} of surprise.`]));
  drawBars(bars, moment.logits, settings(), label, there && there.id);
  drawLens(moment.lens, label, there ? there.id : moment.lens[moment.lens.length - 1][0].id);
  drawAttention();
}

function drawAttention() {
  const { moment } = state;
  const { layer, head } = state.head;
  byId("layer").value = layer;
  byId("head").value = head;
  maps.flat().forEach((button) => {
    const isChosen = button === maps[layer][head];
    button.setAttribute("aria-pressed", isChosen);
    button.tabIndex = isChosen ? 0 : -1; // one stop for the Tab key; the arrow keys move between heads
  });
  if (moment === null) return;
  const seen = moment.tokens.slice(moment.start, moment.position);
  const S = seen.length;
  const weights = moment.attention[layer].subarray(head * S, (head + 1) * S);
  drawLooks(byId("looks"), seen.map(({ piece }) => piece), weights, (i) => label(seen[i].id));
}

let headsInView = false;

async function drawHeads() {
  const { moment } = state;
  if (moment === null) return;
  const { side, maps: weights } = await ask("heads", { tokens: ids(moment.tokens), position: moment.position, start: moment.start });
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--blue-rgb").trim().split(" ").map(Number);
  maps.forEach((row, layer) => row.forEach((button, head) => drawMap(button.firstChild, weights[layer][head], side, colour)));
}

function chooseHead(layer, head) {
  const { n_layer, n_head } = data.header.config;
  state.head = { layer: (layer + n_layer) % n_layer, head: (head + n_head) % n_head };
  drawAttention();
}

/** Put a candidate into the text, in place of the token that stands there and all behind it. */
function take(id) {
  const { moment } = state;
  pause();
  const bits = surprise(moment.logits, id);
  change([...moment.tokens.slice(0, moment.position), { id, piece: "", bits, start: moment.start }]);
  state.chosen = null;
  drawChoice();
  look();
}

// ---------------------------------------------------------------------------------------------------------------------
// Beam search

async function searchBeams(event) {
  event.preventDefault();
  pause();
  byId("beam-search").disabled = true;
  const { tokens } = state;
  const [width, length] = [Number(byId("beam-width").value), Number(byId("beam-length").value)];
  const { beams, steps } = await ask("beams", { tokens: ids(tokens), width, length });
  drawTree(byId("tree"), steps, label);
  byId("beam-list").replaceChildren(
    ...beams.map(({ tokens: found, logProb }) => {
      const button = make("button", { type: "button", textContent: "Take it" });
      const words = found.map(label).join("");
      button.setAttribute("aria-label", `Put ${words} into the text`);
      button.onclick = () => takeAll(tokens, found);
      return make("li", {}, make("b", {}, words), ` ln p = ${logProb.toFixed(2)}`, button);
    }),
  );
  byId("beam-search").disabled = false;
}

/** Continue the text that the search began from with what it found. */
async function takeAll(tokens, found) {
  pause();
  const fresh = found.map((id) => ({ id, piece: "", bits: null, start: null }));
  change(await withSurprise([...tokens, ...fresh], tokens.length));
  state.chosen = null;
  drawChoice();
  look();
}

// ---------------------------------------------------------------------------------------------------------------------
// About

function drawFacts() {
  byId("facts").replaceChildren(...data.facts.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

/** Unpack the weights for the chosen arithmetic. */
async function load() {
  const began = performance.now();
  const simd = byId("arithmetic").value === "simd";
  const question = { header: data.header, base64: byId("weights").textContent, simd };
  const { arithmetic, hasSimd, isPythons } = await ask("load", question);
  byId("differs").hidden = isPythons;
  byId("arithmetic").value = arithmetic === "plain JavaScript" ? "plain" : "simd";
  byId("arithmetic").options[0].disabled = !hasSimd;
  return (performance.now() - began) / 1000;
}

/** Write for a second from where the text ends, and say how fast; the text stays as it is. */
async function measure() {
  pause();
  const tokens = ids(state.tokens);
  const began = performance.now();
  const { written } = await ask("write", { tokens, count: LONGEST, ms: 1000, settings: settings() });
  byId("measured").textContent = `${Math.round(written.length / ((performance.now() - began) / 1000))} tokens a second`;
}

async function changeArithmetic() {
  pause();
  const seconds = await load();
  byId("measured").textContent = `unpacked in ${seconds.toFixed(2)} s`;
  look();
}

// ---------------------------------------------------------------------------------------------------------------------
// What each control does

byId("run").onclick = () => (state.run ? pause() : run());
byId("step").onclick = step;
byId("undo").onclick = undo;
byId("edit").onclick = openEditor;
byId("editor").onsubmit = closeEditor;
byId("cancel").onclick = cancelEditor;
byId("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) closeEditor(event);
  if (event.key === "Escape") cancelEditor();
};
for (const id of ["temperature", "top-k", "top-p", "speed"]) byId(id).oninput = drawSettings;

text.onclick = ({ target }) => {
  const element = target.closest(".token");
  if (element) choose(element === nextMark ? state.tokens.length : Number(element.id.slice("token-".length)));
};
text.onkeydown = (event) => {
  const actions = { " ": byId("run"), Enter: byId("step"), Backspace: byId("undo"), e: byId("edit") };
  if (event.key in actions && !event.ctrlKey && !event.altKey && !event.metaKey) {
    event.preventDefault(); // a space would scroll, and the e end up in the editor
    actions[event.key].click(); // nothing, where the button is disabled
    return;
  }
  const place = state.chosen ?? state.tokens.length;
  const moves = { ArrowLeft: place - 1, ArrowUp: place - 1, ArrowRight: place + 1, ArrowDown: place + 1, Home: 0, End: state.tokens.length };
  if (event.key in moves) {
    event.preventDefault();
    choose(moves[event.key]);
  }
};
bars.forEach((row) => (row.button.onclick = () => take(row.token)));

byId("layer").onchange = () => chooseHead(Number(byId("layer").value), state.head.head);
byId("head").onchange = () => chooseHead(state.head.layer, Number(byId("head").value));
byId("next-head").onclick = () => {
  const isLast = state.head.head === data.header.config.n_head - 1;
  chooseHead(state.head.layer + (isLast ? 1 : 0), state.head.head + 1);
};
maps.forEach((row, layer) => row.forEach((button, head) => (button.onclick = () => chooseHead(layer, head))));
byId("maps").onkeydown = (event) => {
  const { layer, head } = state.head;
  const moves = { ArrowLeft: [layer, head - 1], ArrowRight: [layer, head + 1], ArrowUp: [layer - 1, head], ArrowDown: [layer + 1, head] };
  if (event.key in moves) {
    event.preventDefault();
    chooseHead(...moves[event.key]);
    maps[state.head.layer][state.head.head].focus();
  }
};
new IntersectionObserver(([{ isIntersecting }]) => {
  headsInView = isIntersecting;
  if (headsInView && !state.run) look();
}).observe(byId("maps"));
matchMedia("(prefers-color-scheme: dark)").onchange = () => headsInView && drawHeads();

byId("beam-form").onsubmit = searchBeams;
byId("arithmetic").onchange = changeArithmetic;
byId("measure").onclick = measure;

async function start() {
  const { n_layer, n_head } = data.header.config;
  const choices = (n) => Array.from({ length: n }, (_, i) => make("option", { value: i, textContent: i + 1 }));
  byId("layer").append(...choices(n_layer));
  byId("head").append(...choices(n_head));
  byId("top-k").max = byId("top-k").value = TOP_KS.length - 1;
  byId("bars").append(...bars);
  drawLegend(BITS_PER_SHADE);
  drawFacts();
  drawSettings();
  const seconds = await load();
  await setText(data.prompt, false);
  for (const id of ["run", "step", "edit", "beam-search", "measure"]) byId(id).disabled = false;
  say(`Ready: unpacked in ${seconds.toFixed(2)} s.`);
}

start().catch((error) => say(`The model could not be unpacked: ${error.message}`));
