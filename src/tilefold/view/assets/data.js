// The numbers of the page, where they lie, and what every part of it shares.

const model = JSON.parse(document.getElementById("model").textContent);
const byId = (id) => document.getElementById(id);
const plotOf = (id) => byId(id).querySelector(".plot");
let floats, integers;

// What is chosen. `view` is the part of the map that is shown, in cells: keys x0 to x1, queries y0 to y1.
const state = { layer: 0, head: 0, sequence: 0, query: 0, first: 0, view: null, cell: null, dark: false };

const layer = () => model.layers[state.layer];
// Queries and keys of the chosen sequence: fewer than the arrays hold where a batch is padded.
const own = () => { const [queries, keys] = layer().ends[state.sequence]; return { queries, keys }; };
const nameOf = (l) => model.layers[l].name || "layer";

async function unpacked(id) {
  const element = byId(id);
  const text = atob(element.textContent);
  element.remove();
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function load() {
  const block = await unpacked("packed-numbers");
  floats = new Float32Array(block);
  integers = new Int32Array(block);
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await unpacked("packed-plotly"));
  document.head.append(script);
}

// The numbers of the chosen sequence and head that begin at `at`, `size` per head.
function ofHead(source, at, size) {
  const begin = at + (state.sequence * layer().heads + state.head) * size;
  return source.subarray(begin, begin + size);
}

// Where each bin of an axis begins, and the last one ends.
const edges = (bins, length) => Array.from({ length: bins + 1 }, (_, i) => Math.floor((i * length) / bins));

// Four digits, as the table that stands in the page has them.
function short(x) {
  if (x === null || x === undefined) return "–";
  if (typeof x === "string" || Number.isInteger(x)) return String(x);
  const size = Math.abs(x);
  if (size >= 1e4 && size < 1e9) return x.toFixed(0);
  if (size !== 0 && (size < 1e-4 || size >= 1e9)) return x.toExponential(3).replace(/\.?0+e/, "e");
  return String(Number(x.toPrecision(4)));
}

function tokenAt(key) {
  if (!model.tokens) return null;
  const some = model.tokens[model.tokens.length === 1 ? 0 : state.sequence];
  return some && key >= 0 && key < some.length ? some[key] : null;
}

const quoted = (key) => { const token = tokenAt(key); return token === null ? "" : ` “${visible(token)}”`; };
const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

// The last query stands at the last key.
const keyOfQuery = (i) => i + own().keys - own().queries;
const queryOfKey = (j) => j - own().keys + own().queries;

// Little weight is what the page is closest to: on dark the ramp runs backwards.
const colours = () => (state.dark ? model.ramp.toReversed() : model.ramp);
const colorscale = () => colours().map((c, i, all) => [i / (all.length - 1), c]);

function colourAt(share) {
  const all = colours();
  return all[Math.round(Math.min(Math.max(share, 0), 1) * (all.length - 1))];
}

// Black or white, whichever stands out more (WCAG 2.2, relative luminance): at least 4.5 to 1 on any colour.
function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}

function legend(id, low, high, words) {
  const element = byId(id);
  const bar = document.createElement("i");
  bar.style.background = `linear-gradient(to right, ${colours().join(",")})`;
  element.replaceChildren(short(low), bar, `${short(high)} ${words}`);
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function baseLayout(more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--soft") }, ...more,
  };
}

const axis = (more) => ({ zeroline: false, showgrid: false, ticks: "", automargin: false, linecolor: css("--line"), ...more });
const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false, showTips: false };

// A tip at the pointer; what the keyboard reaches is said instead.
function tip(words, event) {
  const element = byId("tip");
  element.hidden = !words;
  if (!words) return;
  element.textContent = words;
  const box = element.getBoundingClientRect();
  element.style.left = `${Math.min(event.clientX + 14, innerWidth - box.width - 8)}px`;
  element.style.top = `${Math.min(event.clientY + 16, innerHeight - box.height - 8)}px`;
}

const say = (words) => { byId("said").textContent = words; };

function row(cells, header = false) {
  const line = document.createElement("tr");
  for (const cell of cells) {
    const element = document.createElement(header ? "th" : "td");
    if (header) element.scope = "col";
    element.append(typeof cell === "number" ? short(cell) : cell);
    line.append(element);
  }
  return line;
}

function fill(table, caption, header, lines) {
  const head = document.createElement("thead");
  const body = document.createElement("tbody");
  head.append(row(header, true));
  body.append(...lines.map((cells) => (cells instanceof Element ? cells : row(cells))));
  table.replaceChildren(...(caption ? [Object.assign(document.createElement("caption"), { textContent: caption })] : []), head, body);
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value, false, String(value) === String(chosen))));
}
