// What is chosen, the theme, and the start.

const THEMES = ["automatic", "light", "dark"];
let theme = "automatic";
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function drawAll() {
  drawHeads();
  drawMap();
  drawTokens();
  drawProfile();
  drawTable();
}

function applyTheme() {
  state.dark = theme === "dark" || (theme === "automatic" && prefersDark.matches);
  document.documentElement.toggleAttribute("data-dark", state.dark);
  byId("theme").textContent = `Theme: ${theme}`;
}

// Another layer, head or sequence; of the map the same part stays in view where the lengths allow.
function choose(what) {
  const before = [own().keys, own().queries, layer().maps.length].join();
  const within = (x, n) => Math.max(0, Math.min(Number(x), n - 1));
  state.layer = within(what.layer ?? state.layer, model.layers.length);
  state.head = within(what.head ?? state.head, layer().heads);
  state.sequence = within(what.sequence ?? state.sequence, layer().sequences);
  if (before !== [own().keys, own().queries, layer().maps.length].join()) state.view = state.cell = null;
  state.query = within(state.query, own().queries);
  selects();
  drawAll();
}

function selects() {
  options(byId("layer"), model.layers.map((_, i) => [i, nameOf(i)]), state.layer);
  options(byId("head"), Array.from({ length: layer().heads }, (_, i) => [i, String(i)]), state.head);
  options(byId("sequence"), Array.from({ length: layer().sequences }, (_, i) => [i, String(i)]), state.sequence);
  byId("layer").parentElement.hidden = model.layers.length === 1;
  byId("sequence-label").hidden = layer().sequences === 1;
  byId("chosen").textContent = `${own().queries.toLocaleString("en")} queries on ${own().keys.toLocaleString("en")} keys`;
}

async function start() {
  applyTheme();
  await load();
  selects();
  startHeads();
  startMap();
  startTokens();
  startProfile();
  startTable();
  for (const name of ["layer", "head", "sequence"]) byId(name).addEventListener("change", () => choose({ [name]: byId(name).value }));
  const themed = () => { applyTheme(); drawAll(); };
  byId("theme").addEventListener("click", () => { theme = THEMES[(THEMES.indexOf(theme) + 1) % 3]; themed(); });
  prefersDark.addEventListener("change", themed);
  document.documentElement.dataset.ready = "";
}

start().catch((error) => {
  byId("failed").hidden = false;
  byId("failed").textContent = `The pictures could not be drawn (${error}); a browser of 2023 or later is needed. The table below is complete.`;
  throw error;
});
