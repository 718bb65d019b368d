// Draws tensors: pairs of channels as arrows before and after, or any other output as a heat map.

import { toNumbers } from "./rotary.mjs";

const SVG = "http://www.w3.org/2000/svg";
const CELL = 96; // pixels, a pair at a token
const RADIUS = 36;
const MARGIN = { left: 96, top: 46 };
const MOST = 10; // pairs and tokens that are drawn

/** Return the two channels of each of `count` pairs. */
export function listPairs(count, interleaved) {
  return Array.from({ length: count }, (_, i) =>
    interleaved ? [2 * i, 2 * i + 1] : [i, i + count],
  );
}

/**
 * Draw one head: a row for each token, a column for each pair.
 * @param {object} before Tensor (batch, heads, tokens, head_dim).
 * @param {object} after The same, rotated.
 * @param {number} batch
 * @param {number} head
 * @param {[number, number][]} pairs Of channels.
 * @param {string[]} tokens A label for each.
 * @returns {SVGElement}
 */
export function drawPairs(before, after, batch, head, pairs, tokens) {
  const [, heads, length, channels] = before.dims;
  const start = (batch * heads + head) * length * channels;
  const [from, to] = [toNumbers(before), toNumbers(after)];
  const columns = spread(pairs.length);
  const rows = spread(length);
  const svg = make("svg", {
    width: MARGIN.left + columns.length * CELL,
    height: MARGIN.top + rows.length * (CELL + 14),
  });
  columns.forEach((pair, x) => {
    const at = MARGIN.left + (x + 0.5) * CELL;
    svg.append(make("text", { x: at, y: 16 }, `pair ${pair}`));
    svg.append(
      make("text", { x: at, y: 32, class: "quiet" }, `channels ${pairs[pair].join(", ")}`),
    );
  });
  rows.forEach((row, y) => {
    const top = MARGIN.top + y * (CELL + 14);
    svg.append(make("text", { x: MARGIN.left / 2, y: top + CELL / 2 - 4 }, `token ${row}`));
    svg.append(
      make("text", { x: MARGIN.left / 2, y: top + CELL / 2 + 12, class: "quiet" }, tokens[row]),
    );
    columns.forEach((pair, x) => {
      const read = (items) => pairs[pair].map((channel) => items[start + row * channels + channel]);
      const cell = make("g", {
        transform: `translate(${MARGIN.left + (x + 0.5) * CELL} ${top + CELL / 2})`,
      });
      drawPair(cell, read(from), read(to));
      svg.append(cell);
    });
  });
  return svg;
}

// Length of an arrow is relative to the longer of the two; y goes up, as in mathematics.
function drawPair(cell, before, after) {
  const longest = Math.hypot(...before) > Math.hypot(...after) ? before : after;
  const scale = RADIUS / (Math.hypot(...longest) || 1);
  const angles = [before, after].map(([x, y]) => Math.atan2(y, x));
  const turn = ((angles[1] - angles[0] + 3 * Math.PI) % (2 * Math.PI)) - Math.PI;
  cell.append(make("circle", { r: RADIUS }));
  const [begin, end] = angles.map((a) => `${20 * Math.cos(a)} ${-20 * Math.sin(a)}`);
  cell.append(
    make("path", { class: "turn", d: `M0 0 L${begin} A20 20 0 0 ${turn > 0 ? 0 : 1} ${end} Z` }),
  );
  for (const [name, [x, y], angle] of [
    ["before", before, angles[0]],
    ["after", after, angles[1]],
  ]) {
    const length = Math.hypot(x, y) * scale;
    const rotate = `rotate(${(-angle * 180) / Math.PI})`;
    const tip = Math.min(8, length);
    const d = `M0 0 H${length - tip} M${length} 0 l${-tip} 3.5 v-7 Z`;
    cell.append(make("path", { class: `arrow ${name}`, transform: rotate, d }));
  }
  const degrees = Math.round((turn * 180) / Math.PI);
  cell.append(make("text", { y: RADIUS + 14, class: "quiet" }, `${degrees}°`));
}

/**
 * Draw the last two axes of a tensor: a row for each token, a column for each channel.
 * @param {object} tensor
 * @param {number} batch
 * @returns {HTMLCanvasElement} Blue where negative, red where positive, white at 0.
 */
export function drawHeat(tensor, batch) {
  const [rows, columns] = tensor.dims.slice(-2);
  const items = toNumbers(tensor).slice(batch * rows * columns, (batch + 1) * rows * columns);
  const largest = items.reduce((most, item) => Math.max(most, Math.abs(item)), 0) || 1;
  const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
  canvas.style.height = `${rows * 28}px`;
  const context = canvas.getContext("2d");
  items.forEach((item, i) => {
    const pale = 96 - 50 * Math.abs(item / largest);
    context.fillStyle = `hsl(${item < 0 ? 214 : 8} 75% ${pale}%)`;
    context.fillRect(i % columns, Math.floor(i / columns), 1, 1);
  });
  return canvas;
}

/** Choose at most MOST of the first `count` numbers, evenly, the first and the last included. */
function spread(count) {
  if (count <= MOST) return Array.from({ length: count }, (_, i) => i);
  return Array.from({ length: MOST }, (_, i) => Math.round((i * (count - 1)) / (MOST - 1)));
}

function make(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
