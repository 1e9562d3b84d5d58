// Layers down, heads across: which head to look at.

const isNumber = (x) => typeof x === "number";
const measures = () => model.table.header.slice(3).filter((name) => !name.endsWith("at key"));

function headsOf(measure) {
  const column = model.table.header.indexOf(measure);
  const most = Math.max(...model.layers.map((l) => l.heads));
  const grid = model.layers.map(() => new Array(most).fill(null));
  let line = 0;
  model.layers.forEach((l, at) => {
    for (let s = 0; s < l.sequences; s++) {
      for (let h = 0; h < l.heads; h++, line++) {
        const x = model.table.lines[line][column];
        if (s === Math.min(state.sequence, l.sequences - 1) && isNumber(x)) grid[at][h] = x;
      }
    }
  });
  return grid;
}

function drawHeads() {
  const measure = byId("measure").value;
  byId("heads-card").hidden = !measure;
  if (!measure) return;
  const z = headsOf(measure);
  const there = z.flat().filter((x) => x !== null);
  const [low, high] = there.length ? [Math.min(...there), Math.max(...there)] : [0, 1];
  const count = z.length;
  const cell = Math.max(13, Math.min(30, 420 / count));
  const names = model.layers.map((l, i) => (l.name || (count === 1 ? "" : String(i))));
  const longest = Math.max(...names.map((n) => n.length));
  const left = Math.min(150, 16 + 6.6 * longest);
  const fits = names.map((n) => escaped(n.length > 20 ? `…${n.slice(-19)}` : n));
  const step = Math.ceil(count / 40);
  Plotly.react(plotOf("heads"), [{
    type: "heatmap", z, zmin: low, zmax: high > low ? high : low + 1, colorscale: colorscale(), showscale: false,
    xgap: 1.5, ygap: cell > 20 ? 1.5 : 0.5, hoverinfo: "none",
  }], baseLayout({
    height: 44 + cell * count, margin: { l: left, r: 8, t: 4, b: 40 }, dragmode: false,
    xaxis: axis({ title: { text: "head", standoff: 6 }, fixedrange: true, dtick: Math.ceil(z[0].length / 16), tick0: 0 }),
    yaxis: axis({
      autorange: "reversed", fixedrange: true, tickvals: names.map((_, i) => i).filter((i) => i % step === 0),
      ticktext: fits.filter((_, i) => i % step === 0),
    }),
    shapes: [{
      type: "rect", x0: state.head - 0.5, x1: state.head + 0.5, y0: state.layer - 0.5, y1: state.layer + 0.5,
      line: { color: css("--mark"), width: 2.5 },
    }],
  }), config);
  legend("heads-legend", low, high, measure);
  byId("heads").setAttribute("aria-label", `Layers and heads by ${measure}: chosen is ${headWords(z)}`);
}

function headWords(z = headsOf(byId("measure").value)) {
  const where = `${model.layers.length > 1 ? `${nameOf(state.layer)}, ` : ""}head ${state.head}`;
  return `${where}: ${byId("measure").value} ${short(z[state.layer][state.head])}`;
}

function startHeads() {
  options(byId("measure"), measures().map((m) => [m, m]), measures().find((m) => m.startsWith("entropy")) ?? measures()[0]);
  byId("measure").addEventListener("change", drawHeads);
  drawHeads();
  const plot = plotOf("heads");
  if (!measures().length) return;
  plot.on("plotly_click", (e) => choose({ layer: e.points[0].y, head: e.points[0].x }));
  plot.on("plotly_hover", (e) => {
    const { x, y, z } = e.points[0];
    tip(`${model.layers.length > 1 ? `${nameOf(y)} · ` : ""}head ${x}\n${byId("measure").value} ${short(z)}`, e.event);
  });
  plot.on("plotly_unhover", () => tip(""));
  byId("heads").addEventListener("keydown", (e) => {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
    if (!by) return;
    e.preventDefault();
    choose({ layer: state.layer + by[0], head: state.head + by[1] });
    say(headWords());
  });
}
