"use strict";
/*
 * The pictures: each function draws one panel from numbers it is given, and keeps nothing. Text of the model or of a
 * person enters the page only as textContent, so that it is shown and never run, whatever it contains.
 */

/** A new element: make("b", {className: "x"}, "text or elements", ...). */
function make(tag, properties = {}, ...content) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...content.filter((item) => item !== null));
  return element;
}

const byId = (id) => document.getElementById(id);
const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : p >= 0.00095 ? (100 * p).toFixed(1) : p > 0 ? "< 0.1" : "0") + " %";
const bitsInWords = (bits) => `${bits.toFixed(1)} ${bits.toFixed(1) === "1.0" ? "bit" : "bits"}`;

/** How deep a token is coloured, from 0 to 7 (style.css): one step for each `bitsPerShade` bits of surprise. */
const DEEPEST = 7;
const surpriseShade = (bits, bitsPerShade) => Math.min(DEEPEST, Math.floor(bits / bitsPerShade));

function drawLegend(bitsPerShade) {
  byId("legend-colours").replaceChildren(
    ...Array.from({ length: DEEPEST + 1 }, (_, shade) => {
      const swatch = make("i", { textContent: `${shade * bitsPerShade}${shade === DEEPEST ? "+" : ""}` });
      swatch.dataset.shade = shade;
      return swatch;
    }),
  );
}

/** One token of a text as an element that shows its piece. */
function tokenElement(piece) {
  const element = make("span", { className: "token", textContent: piece });
  element.classList.toggle("break", piece.startsWith("\n"));
  element.classList.toggle("part", piece === ""); // a part of a character, which a later token completes
  return element;
}

// ---------------------------------------------------------------------------------------------------------------------
// What could come next

/**
 * The likeliest tokens as bars: outlined what the model thinks, filled what is drawn from.
 *
 * rows: the list's elements, drawn into again and again, so that the keyboard's focus stays where it is. drawn: the
 * token that stands there in the text, or null.
 */
function drawBars(rows, logits, settings, label, drawn) {
  const plain = nextTokenProbs(logits);
  const shaped = nextTokenProbs(logits, settings);
  const shown = mostProbable(plain, rows.length);
  if (drawn !== null && !shown.includes(drawn)) shown[shown.length - 1] = drawn;
  const highest = Math.max(...shown.map((id) => Math.max(plain[id], shaped[id])));
  const scale = [0.1, 0.25, 0.5, 1].find((whole) => highest <= whole + 1e-9);
  rows.forEach((row, i) => {
    row.hidden = i >= shown.length;
    if (row.hidden) return;
    const id = shown[i];
    const [name, bar, figures] = row.button.children;
    row.token = id;
    row.className = `${id === drawn ? "drawn" : ""} ${shaped[id] === 0 ? "cut" : ""}`.trim();
    name.textContent = label(id);
    bar.children[0].style.setProperty("--share", shaped[id] / scale);
    bar.children[1].style.setProperty("--share", plain[id] / scale);
    figures.replaceChildren(make("span", {}, `${percent(plain[id])} → `), percent(shaped[id]));
    const fate = shaped[id] === 0 ? "never drawn" : `drawn with ${percent(shaped[id])}`;
    row.button.setAttribute("aria-label", `${label(id)}: the model gives it ${percent(plain[id])}, ${fate}`);
  });
  const others = plain.length - shown.length;
  const rest = 1 - shown.reduce((sum, id) => sum + plain[id], 0);
  const choices = (probs) => `${(2 ** entropy(probs)).toFixed(1)}`;
  byId("bars-rest").textContent =
    (others > 0 ? `The other ${others.toLocaleString("en")} share ${percent(Math.max(0, rest))}. ` : "") +
    `As uncertain as a choice among ${choices(plain)} equal tokens; as drawn, among ${choices(shaped)}.`;
}

/** In bits. */
function entropy(probs) {
  return probs.reduce((sum, p) => (p > 0 ? sum - p * Math.log2(p) : sum), 0);
}

/** The list's rows, empty: [li], each with its button. */
function makeBarRows(n) {
  return Array.from({ length: n }, () => {
    const bar = make("span", { className: "bar" }, make("i", { className: "filled" }), make("i", { className: "outline" }));
    const button = make("button", { type: "button" }, make("b"), bar, make("span", { className: "figures" }));
    return Object.assign(make("li", { hidden: true }, button), { button });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention

/** Shade each of the pieces (S) by its weight (S); the last one is the token that looks. */
function drawLooks(container, pieces, weights, label) {
  const highest = Math.max(...weights);
  const elements = pieces.map((piece, i) => {
    const element = tokenElement(piece);
    element.style.setProperty("--shade", ((weights[i] / highest) ** 0.6).toFixed(3));
    element.title = percent(weights[i]);
    return element;
  });
  elements[elements.length - 1].classList.add("chosen");
  container.replaceChildren(...elements);
  container.scrollTop = container.scrollHeight;
  const most = mostProbable(weights, 3).map((i) => `${label(i)} (${percent(weights[i])}${i === pieces.length - 1 ? ", itself" : `, ${pieces.length - 1 - i} before`})`);
  byId("looks-most").textContent = `Most: ${most.join(", ")}.`;
}

/** A button for each head, with an empty picture each: [layer][head]. */
function makeMaps(container, n_layer, n_head) {
  container.style.setProperty("--heads", n_head);
  return Array.from({ length: n_layer }, (_, layer) => {
    const buttons = Array.from({ length: n_head }, (_, head) => {
      const button = make("button", { type: "button", title: `Layer ${layer + 1}, head ${head + 1}` }, make("canvas"));
      button.setAttribute("aria-label", button.title);
      return button;
    });
    const name = make("p", { textContent: `Layer ${layer + 1}` });
    container.append(make("div", {}, name, make("div", { className: "layer" }, ...buttons)));
    return buttons;
  });
}

/** One head's picture: weights (side, side), a row for each token that looks. Lightness carries the number. */
function drawMap(canvas, weights, side, colour) {
  canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    image.data.set(colour, 4 * i);
    image.data[4 * i + 3] = 255 * Math.sqrt(weights[i]);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layer by layer

/** lens: for each layer the likeliest tokens [{id, probability}]; answer: the token to mark, or null. */
function drawLens(lens, label, answer) {
  const places = ["1st guess", "2nd", "3rd", "4th", "5th"].slice(0, lens[0].length);
  const column = (text) => make("th", { scope: "col", textContent: text });
  byId("lens-head").replaceChildren(make("tr", {}, column("read after"), ...places.map(column)));
  byId("lens-body").replaceChildren(
    ...lens.map((guesses, layer) => {
      const name = layer === 0 ? "before layer 1" : layer === lens.length - 1 ? `layer ${layer}: the answer` : `layer ${layer}`;
      const cells = guesses.map(({ id, probability }) => {
        const cell = make("td", { className: id === answer ? "answer" : "" }, make("b", {}, label(id)), " ", make("small", {}, percent(probability)));
        cell.style.setProperty("--shade", probability.toFixed(3));
        return cell;
      });
      return make("tr", {}, make("th", { scope: "row", textContent: name }), ...cells);
    }),
  );
}

// ---------------------------------------------------------------------------------------------------------------------
// Beam search

/** The tree of a search as nodes with children. steps: as beamSearch returns them. Returns the root. */
function growTree(steps) {
  const root = { children: [], logProb: 0, fate: "root" };
  let beams = [root];
  for (const step of steps) {
    const grown = step.map(({ parent, token, logProb, kept }) => {
      const node = { token, logProb, up: beams[parent], children: [], fate: kept ? "kept" : "dropped" };
      beams[parent].children.push(node); // likeliest first, as the steps are
      return node;
    });
    beams = grown.filter(({ fate }) => fate === "kept");
  }
  for (let node = beams[0]; node.up; node = node.up) node.fate = "best";
  return root;
}

/**
 * Give each node a column, its depth, and a line: its likeliest child stands on its own line, the other children below,
 * each as high as it can be without running into what stands there. Returns the nodes.
 */
function layOut(root) {
  const nodes = [];
  const used = []; // the lowest line that is taken in each column
  const place = (node, depth, line) => {
    const chain = []; // the node, its likeliest child, that one's likeliest child ...
    for (let next = node; next; next = next.children[0]) chain.push(next);
    const free = Math.max(line, ...chain.map((_, i) => (used[depth + i] ?? -1) + 1));
    chain.forEach((next, i) => {
      Object.assign(next, { depth: depth + i, line: free });
      used[depth + i] = free;
      nodes.push(next);
    });
    for (const next of chain.reverse()) { // from the right, where there is room close by
      for (const child of next.children.slice(1)) place(child, next.depth + 1, free + 1);
    }
  };
  place(root, 0, 0);
  return nodes;
}

/** Draw the tree of a search from left to right. Each column is as wide as its widest text, which the browser measures. */
function drawTree(container, steps, label) {
  const svg = (tag, attributes, ...content) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...content);
    return element;
  };
  const [LINE, GAP] = [24, 34]; // between lines; between a text and the next column
  const nodes = layOut(growTree(steps));
  const order = ["dropped", "kept", "best", "root"]; // what matters most is drawn last, on top
  nodes.sort((a, b) => order.indexOf(a.fate) - order.indexOf(b.fate));
  const drawing = svg("svg", { role: "img" });
  drawing.setAttribute("aria-label", "A tree of continuations; those that were kept to the end are in the list below");
  container.replaceChildren(drawing);
  for (const node of nodes) {
    node.text = svg("text", {}, node.up ? label(node.token) : "●");
    node.group = svg("g", { class: node.fate }, node.text);
    if (node.up) {
      const here = percent(Math.exp(node.logProb - node.up.logProb));
      node.text.append(svg("tspan", { class: "share", dx: 5 }, here));
      node.text.append(svg("title", {}, `${label(node.token)}: ${here} here, ln p = ${node.logProb.toFixed(2)} up to here`));
    }
    drawing.append(node.group);
  }
  const widths = [];
  for (const node of nodes) {
    node.width = node.text.getBBox().width;
    widths[node.depth] = Math.max(widths[node.depth] ?? 0, node.width);
  }
  const columns = [4]; // where each begins
  widths.forEach((width, depth) => (columns[depth + 1] = columns[depth] + width + GAP));
  const y = (node) => LINE * (node.line + 0.6);
  for (const node of nodes) {
    node.text.setAttribute("x", columns[node.depth]);
    node.text.setAttribute("y", y(node) + 5);
    if (!node.up) continue;
    const from = columns[node.up.depth] + node.up.width + 5;
    const to = columns[node.depth] - 6;
    const turn = Math.max(from, to - GAP + 11); // the line leaves its parent's only where it has to
    const curve = `C ${(turn + to) / 2} ${y(node.up)}, ${(turn + to) / 2} ${y(node)}, ${to} ${y(node)}`;
    node.group.prepend(svg("path", { d: `M ${from} ${y(node.up)} H ${turn} ${curve}` }));
  }
  const width = columns[widths.length] - GAP + 8;
  const height = LINE * (1.3 + Math.max(...nodes.map(({ line }) => line)));
  for (const [name, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) drawing.setAttribute(name, value);
}
