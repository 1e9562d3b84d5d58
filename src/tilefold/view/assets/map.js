// The pooled map. The part that is shown is drawn from the coarsest map that still has bins enough for it.

const ENOUGH = 100; // bins along the longer side, below which a finer map is taken
const LEAST = 4; // cells a side of the smallest part
const DECADES = 4; // that a logarithmic scale shows below its largest number
const MARGIN = { l: 84, r: 10, t: 6, b: 62 };
const NAMED = 40; // cells a side, up to which they are named by their tokens
let drawn = null;

const whole = () => ({ x0: 0, x1: own().keys, y0: 0, y1: own().queries });

function levelFor(view) {
  const { maps } = layer();
  const { keys, queries } = own();
  const level = maps.findIndex((m) =>
    Math.max((m.cols * (view.x1 - view.x0)) / keys, (m.rows * (view.y1 - view.y0)) / queries) >= ENOUGH);
  return level < 0 ? maps.length - 1 : level;
}

// The bins of an axis that lie in a range and hold a cell at all.
function binsWithin(at, from, to) {
  const bins = [];
  for (let i = 0; i + 1 < at.length; i++) if (at[i + 1] > at[i] && at[i + 1] > from && at[i] < to) bins.push(i);
  return bins;
}

function drawMap() {
  const shown = layer().maps.length > 0 && own().keys > 0 && own().queries > 0;
  byId("map-card").hidden = !shown;
  if (!shown) return;
  const view = (state.view ??= whole());
  const level = levelFor(view);
  const map = layer().maps[level];
  const all = ofHead(floats, map.at, map.rows * map.cols);
  const [xs, ys] = [edges(map.cols, own().keys), edges(map.rows, own().queries)];
  const [cols, rows] = [binsWithin(xs, view.x0, view.x1), binsWithin(ys, view.y0, view.y1)];
  const log = byId("scale").value === "log";
  const high = all.reduce((a, b) => (b > a ? b : a), 0);
  const least = all.reduce((a, b) => (b > 0 && b < a ? b : a), Infinity);
  const lowest = high * 10 ** -DECADES || 1e-4;
  const low = !log ? 0 : least < high ? Math.max(least, lowest) : lowest;
  const drawnAs = log ? (x) => Math.log10(Math.max(x, low)) : (x) => x;
  const z = rows.map((r) => cols.map((c) => { const x = all[r * map.cols + c]; return x > 0 ? drawnAs(x) : null; }));
  drawn = { map, all, xs, ys, cols, rows, level };
  const bound = (at, bins) => [...bins.map((i) => at[i]), at[bins.at(-1) + 1]];
  const wide = plotOf("map").clientWidth || 700;
  Plotly.react(plotOf("map"), [{
    type: "heatmap", z, x: bound(xs, cols), y: bound(ys, rows), zmin: drawnAs(low), zmax: drawnAs(high || 1),
    colorscale: colorscale(), showscale: false, hoverinfo: "none", hoverongaps: true, zsmooth: false,
  }], baseLayout({
    height: Math.round(Math.min(760, Math.max(380, wide * 0.86))), margin: MARGIN, dragmode: "zoom",
    xaxis: axis({
      title: { text: "key", standoff: 8 }, range: [view.x0, view.x1], ...ticks(view.x0, view.x1, (j) => j),
      tickangle: names(view.x0, view.x1) ? -90 : 0,
    }),
    yaxis: axis({ title: { text: "query", standoff: 6 }, range: [view.y1, view.y0], ...ticks(view.y0, view.y1, keyOfQuery) }),
    shapes: cursor(),
  }), config);
  const size = (at, bins) => Math.max(...bins.map((i) => at[i + 1] - at[i]));
  const [tall, broad] = [size(ys, rows), size(xs, cols)];
  legend("map-legend", low, high, `${tall * broad === 1 ? "" : "pooled "}weight${log ? ", logarithmic" : ""}`);
  byId("level").textContent = `${tall * broad === 1 ? "single cells" : `bins of ${tall} × ${broad} cells`}; ` +
    `map ${level + 1} of ${layer().maps.length} (${map.rows} × ${map.cols})`;
  drawLargest();
}

const names = (a, b) => model.tokens !== null && b - a <= NAMED;

// Few cells are named by their tokens, many are counted.
function ticks(a, b, keyOf) {
  const frame = { showline: true, mirror: true };
  if (!names(a, b)) return { ...frame, tickformat: ",d", nticks: 9 };
  const cells = Array.from({ length: Math.ceil(b) - Math.floor(a) }, (_, i) => Math.floor(a) + i);
  const cut = (word) => (word.length > 9 ? `${word.slice(0, 8)}…` : word);
  const words = cells.map((i) => escaped(cut(visible(tokenAt(keyOf(i)) ?? String(i)))));
  return { ...frame, tickvals: cells.map((i) => i + 0.5), ticktext: words, tickfont: { size: 10 } };
}

// Plotly reads its labels as markup.
const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function cursor() {
  if (!state.cell) return [];
  const { r, c } = state.cell;
  const { xs, ys } = drawn;
  return [{ type: "rect", x0: xs[c], x1: xs[c + 1], y0: ys[r], y1: ys[r + 1], line: { color: css("--mark"), width: 2 } }];
}

const MANY = { query: "queries", key: "keys" };
const range = (what, a, b) => (b - a === 1 ? `${what} ${a}` : `${MANY[what]} ${a}–${b - 1}`);

function cellWords(r, c) {
  const { xs, ys, all, map } = drawn;
  const words = (what, from, to, key) => range(what, from, to) + (to - from === 1 ? quoted(key) : "");
  return `${words("query", ys[r], ys[r + 1], keyOfQuery(ys[r]))} → ${words("key", xs[c], xs[c + 1], xs[c])}: ${short(all[r * map.cols + c])}`;
}

function drawLargest() {
  if (!byId("map-details").open) return;
  const { xs, ys, cols, rows, all, map } = drawn;
  const found = rows.flatMap((r) => cols.map((c) => [r, c, all[r * map.cols + c]])).sort((a, b) => b[2] - a[2]).slice(0, 25);
  fill(byId("map-numbers"), "", ["queries", "keys", "pooled weight"],
    found.map(([r, c, x]) => [range("query", ys[r], ys[r + 1]), range("key", xs[c], xs[c + 1]), x]));
}

// Another part of the map; `at` is what the keyboard pointed at, which then stays the cell in focus.
function show(view) {
  const fit = (a, b, length) => {
    const span = Math.min(Math.max(b - a, Math.min(LEAST, length)), length);
    const from = Math.min(Math.max((a + b - span) / 2, 0), length - span);
    return span > NAMED ? [from, from + span] : [Math.round(from), Math.round(from) + Math.round(span)]; // few cells: whole ones
  };
  const place = state.cell && [drawn.xs[state.cell.c], drawn.ys[state.cell.r]];
  const [x0, x1] = fit(view.x0, view.x1, own().keys);
  const [y0, y1] = fit(view.y0, view.y1, own().queries);
  state.view = { x0, x1, y0, y1 };
  state.cell = null;
  drawMap();
  if (place) {
    state.cell = { c: binOf(drawn.xs, place[0]), r: binOf(drawn.ys, place[1]) };
    drawMap();
  }
}

const binOf = (at, x) => { let i = at.length - 2; while (i > 0 && (at[i] > x || at[i + 1] === at[i])) i--; return i; };

function zoom(factor, x, y) {
  const v = state.view;
  const [cx, cy] = [x ?? (v.x0 + v.x1) / 2, y ?? (v.y0 + v.y1) / 2];
  show({
    x0: cx - (cx - v.x0) * factor, x1: cx + (v.x1 - cx) * factor, y0: cy - (cy - v.y0) * factor, y1: cy + (v.y1 - cy) * factor,
  });
}

function pan(dx, dy) {
  const v = state.view;
  const [w, h] = [(v.x1 - v.x0) * dx, (v.y1 - v.y0) * dy];
  show({ x0: v.x0 + w, x1: v.x1 + w, y0: v.y0 + h, y1: v.y1 + h });
}

const moves = {
  in: () => zoom(0.5), out: () => zoom(2), left: () => pan(-0.5, 0), right: () => pan(0.5, 0), up: () => pan(0, -0.5),
  down: () => pan(0, 0.5), all: () => show(whole()),
};

function partWords() {
  const v = state.view;
  return `queries ${Math.floor(v.y0)} to ${Math.ceil(v.y1) - 1}, keys ${Math.floor(v.x0)} to ${Math.ceil(v.x1) - 1}, ${byId("level").textContent}`;
}

function moveCell(dr, dc) {
  const { rows, cols } = drawn;
  if (!state.cell) state.cell = { r: rows[0], c: cols[0] };
  else {
    const { r, c } = state.cell;
    state.cell = { r: Math.min(Math.max(r + dr, 0), drawn.map.rows - 1), c: Math.min(Math.max(c + dc, 0), drawn.map.cols - 1) };
    const v = state.view;
    if (drawn.xs[state.cell.c] < v.x0 || drawn.xs[state.cell.c + 1] > v.x1) pan(dc * 0.5, 0);
    if (drawn.ys[state.cell.r] < v.y0 || drawn.ys[state.cell.r + 1] > v.y1) pan(0, dr * 0.5);
  }
  drawMap();
  const words = cellWords(state.cell.r, state.cell.c);
  byId("cell").textContent = words;
  say(words);
}

function mapKey(e) {
  const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
  const at = state.cell && [(drawn.xs[state.cell.c] + drawn.xs[state.cell.c + 1]) / 2, (drawn.ys[state.cell.r] + drawn.ys[state.cell.r + 1]) / 2];
  if (by) moveCell(...by);
  else if (e.key === "+" || e.key === "=") zoom(0.5, ...(at ?? []));
  else if (e.key === "-" || e.key === "−") zoom(2, ...(at ?? []));
  else if (e.key === "0") moves.all();
  else if (e.key === "Enter" && state.cell) ask(drawn.ys[state.cell.r], true);
  else return;
  e.preventDefault();
  if (!by && e.key !== "Enter") say(partWords());
}

// The place under the pointer, in cells.
function under(e) {
  const box = plotOf("map").getBoundingClientRect();
  const share = (at, from, size, before, after) => (at - from - before) / (size - before - after);
  const v = state.view;
  return [
    v.x0 + (v.x1 - v.x0) * share(e.clientX, box.left, box.width, MARGIN.l, MARGIN.r),
    v.y0 + (v.y1 - v.y0) * share(e.clientY, box.top, box.height, MARGIN.t, MARGIN.b),
  ];
}

function startMap() {
  byId("scale").addEventListener("change", drawMap);
  byId("map-details").addEventListener("toggle", drawLargest);
  for (const button of document.querySelectorAll("[data-do]")) {
    button.addEventListener("click", () => { moves[button.dataset.do](); say(partWords()); });
  }
  drawMap();
  if (!drawn) return;
  const plot = plotOf("map");
  byId("map").addEventListener("keydown", mapKey);
  byId("map").addEventListener("wheel", (e) => {
    if (document.activeElement !== byId("map") && !e.ctrlKey) return; // else a page could not be scrolled past it
    e.preventDefault();
    zoom(e.deltaY < 0 ? 0.8 : 1.25, ...under(e));
  }, { passive: false });
  plot.addEventListener("pointerdown", () => byId("map").focus({ preventScroll: true }));
  plot.on("plotly_relayout", (e) => {
    const [x0, x1, y1, y0] = ["xaxis.range[0]", "xaxis.range[1]", "yaxis.range[0]", "yaxis.range[1]"].map((name) => e[name]);
    if (x0 === undefined && y0 === undefined) return;
    show({ x0: x0 ?? state.view.x0, x1: x1 ?? state.view.x1, y0: y0 ?? state.view.y0, y1: y1 ?? state.view.y1 });
  });
  plot.on("plotly_hover", (e) => {
    const [r, c] = [drawn.rows[e.points[0].pointNumber[0]], drawn.cols[e.points[0].pointNumber[1]]];
    byId("cell").textContent = cellWords(r, c);
    tip(cellWords(r, c).replace(": ", "\n"), e.event);
  });
  plot.on("plotly_unhover", () => tip(""));
  plot.on("plotly_click", (e) => ask(drawn.ys[drawn.rows[e.points[0].pointNumber[0]]], true));
}
