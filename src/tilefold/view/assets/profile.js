// One statistic of the chosen head along its queries or keys.

const SHOWN = 500; // numbers that are written out below the line

function along() {
  const [kind, name] = byId("along").value.split(/:(.*)/s);
  const source = kind === "rows" ? layer().rows : layer().columns;
  const length = kind === "rows" ? layer().queries : layer().keys;
  if (!source[name]) return null;
  const numbers = ofHead(floats, source[name].at, length).subarray(0, kind === "rows" ? own().queries : own().keys);
  return { kind, name, unit: source[name].unit, numbers };
}

function drawProfile() {
  const names = [...Object.keys(layer().rows).map((n) => [`rows:${n}`, `${n} of queries`]),
    ...Object.keys(layer().columns).map((n) => [`columns:${n}`, `${n} of keys`])];
  const select = byId("along");
  if (names.map(([v]) => v).join() !== [...select.options].map((o) => o.value).join()) options(select, names, select.value);
  byId("profile-card").hidden = !names.length;
  const line = along();
  byId("profile-card").hidden = !line?.numbers.length;
  if (!line?.numbers.length) return;
  const what = line.kind === "rows" ? "query" : "key";
  const words = `${line.name}${line.unit ? `, ${line.unit}` : ""}`;
  Plotly.react(plotOf("profile"), [{
    type: "scatter", mode: line.numbers.length < 60 ? "lines+markers" : "lines", y: Array.from(line.numbers), hoverinfo: "none",
    line: { color: css("--accent"), width: 1.6 }, marker: { size: 4 },
  }], baseLayout({
    height: 250, margin: { l: 58, r: 8, t: 8, b: 42 }, dragmode: false, hovermode: "x",
    xaxis: axis({ title: { text: what, standoff: 6 }, fixedrange: true, tickformat: ",d", nticks: 7 }),
    yaxis: axis({
      title: { text: escaped(words), standoff: 6 }, fixedrange: true, rangemode: "tozero", showgrid: true, gridcolor: css("--line"),
      nticks: 6,
    }),
  }), config);
  const [least, most] = [line.numbers.reduce((a, b) => Math.min(a, b)), line.numbers.reduce((a, b) => Math.max(a, b))];
  byId("profile").setAttribute("aria-label",
    `${line.name} along ${line.numbers.length} ${what === "key" ? "keys" : "queries"}: from ${short(least)} to ${short(most)}, ` +
    `largest at ${what} ${line.numbers.indexOf(most)}`);
  drawProfileNumbers();
}

function drawProfileNumbers() {
  const line = along();
  if (!byId("profile-details").open || !line) return;
  const step = Math.ceil(line.numbers.length / SHOWN);
  const lines = [];
  for (let i = 0; i < line.numbers.length; i += step) lines.push([String(i), line.numbers[i]]);
  fill(byId("profile-numbers"), step > 1 ? `Every ${step}th number` : "", [line.kind === "rows" ? "query" : "key", line.name], lines);
}

function startProfile() {
  byId("along").addEventListener("change", drawProfile);
  byId("profile-details").addEventListener("toggle", drawProfileNumbers);
  drawProfile();
  if (byId("profile-card").hidden) return;
  const plot = plotOf("profile");
  plot.on("plotly_hover", (e) => {
    const line = along();
    const i = e.points[0].pointNumber;
    tip(`${line.kind === "rows" ? `query ${i}${quoted(keyOfQuery(i))}` : `key ${i}${quoted(i)}`}\n${line.name} ${short(line.numbers[i])}`, e.event);
  });
  plot.on("plotly_unhover", () => tip(""));
  plot.on("plotly_click", (e) => {
    const i = e.points[0].pointNumber;
    ask(along().kind === "rows" ? i : queryOfKey(i), true);
  });
}
