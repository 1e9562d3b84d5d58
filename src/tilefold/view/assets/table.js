// The table of heads stands in the page; here it is sorted, chosen from and saved, with all digits.

let order = null;

function save(name, kind, text) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Lines in the order that is shown.
const inOrder = () => order.map((n) => model.table.lines[n]);

function asCsv() {
  const field = (x) => (x === null ? "" : /[",\n\r]/.test(String(x)) ? `"${String(x).replaceAll('"', '""')}"` : String(x));
  return [model.table.header, ...inOrder()].map((line) => line.map(field).join(",")).join("\r\n") + "\r\n";
}

const asJson = () => JSON.stringify(inOrder().map((line) => Object.fromEntries(line.map((x, i) => [model.table.header[i], x]))), null, 1);

function sortBy(column, button) {
  const was = button.parentElement.getAttribute("aria-sort");
  const down = was === "ascending" ? -1 : 1;
  const value = (n) => { const x = model.table.lines[n][column]; return isNumber(x) || column === 0 ? x : x === "-inf" ? -Infinity : Infinity; };
  order.sort((a, b) => (value(a) < value(b) ? -down : value(a) > value(b) ? down : a - b));
  for (const other of button.closest("tr").children) other.removeAttribute("aria-sort");
  button.parentElement.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
  const body = byId("numbers").tBodies[0];
  body.append(...order.map((n) => lines[n]));
}

let lines = [];

function lineOf({ layer: l, sequence: s, head: h }) {
  let n = 0;
  for (let at = 0; at < l; at++) n += model.layers[at].sequences * model.layers[at].heads;
  return n + s * model.layers[l].heads + h;
}

function drawTable() {
  for (const line of lines) {
    line.classList.toggle("chosen", line === lines[lineOf(state)]);
    line.setAttribute("aria-current", line === lines[lineOf(state)]);
  }
}

function startTable() {
  lines = [...byId("numbers").tBodies[0].rows];
  order = lines.map((_, n) => n);
  byId("numbers").querySelectorAll("thead button").forEach((button, column) => button.addEventListener("click", () => sortBy(column, button)));
  const places = model.layers.flatMap((l, at) =>
    Array.from({ length: l.sequences * l.heads }, (_, n) => ({ layer: at, sequence: Math.floor(n / l.heads), head: n % l.heads })));
  lines.forEach((line, n) => line.addEventListener("click", () => choose(places[n])));
  byId("csv").addEventListener("click", () => save("heads.csv", "text/csv", asCsv()));
  byId("json").addEventListener("click", () => save("heads.json", "application/json", asJson()));
  drawTable();
}
