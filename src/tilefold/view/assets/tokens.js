// Keys as tokens, coloured by what they received; pointing at one shows what it looks at as a query.

const MOST = 400; // tokens at once

function paint() {
  const name = byId("paint").value;
  return name ? { name, numbers: ofHead(floats, layer().columns[name].at, layer().keys) } : null;
}

function drawTokens() {
  const { keys } = own();
  const names = Object.keys(layer().columns);
  if (names.join() !== [...byId("paint").options].map((o) => o.value).join()) options(byId("paint"), names.map((n) => [n, n]), names[0]);
  byId("paint-label").hidden = !names.length;
  byId("tokens-card").hidden = !names.length && !layer().top;
  state.first = Math.max(0, Math.min(state.first, keys - 1));
  const last = Math.min(keys, state.first + MOST);
  const given = paint();
  const high = given ? given.numbers.reduce((a, b) => (b > a ? b : a), 0) : 0;
  const elements = [];
  for (let j = state.first; j < last; j++) {
    const element = document.createElement("div");
    element.setAttribute("role", "option");
    element.dataset.key = j;
    element.textContent = visible(tokenAt(j) ?? String(j));
    element.tabIndex = -1;
    element.setAttribute("aria-selected", "false");
    if (given) {
      const share = high > 0 ? Math.sqrt(given.numbers[j] / high) : 0; // areas, so to speak: small masses stay apart
      element.style.background = colourAt(share);
      element.style.color = inkOn(colourAt(share));
      if (share < 0.08) element.className = "pale";
      element.setAttribute("aria-label", `key ${j}${quoted(j)}, ${given.name} ${short(given.numbers[j])}`);
    }
    elements.push(element);
  }
  byId("tokens").replaceChildren(...elements);
  byId("part").textContent = keys > MOST ? `keys ${state.first}–${last - 1} of ${keys.toLocaleString("en")}` : `${keys} keys`;
  byId("before").hidden = byId("after").hidden = keys <= MOST;
  byId("before").disabled = state.first === 0;
  byId("after").disabled = last === keys;
  byId("tokens-legend").hidden = !given;
  if (given) legend("tokens-legend", 0, high, `${given.name}, colours by its square root`);
  drawLooks();
}

function tokenElement(key) {
  return byId("tokens").querySelector(`[data-key="${key}"]`);
}

// What a query looks at: the list, and the keys among the tokens.
function looks(i) {
  const { top, queries } = layer();
  if (!top || i < 0 || i >= own().queries) return [];
  const [weights, keys] = [ofHead(floats, top.weights, queries * top.k), ofHead(integers, top.keys, queries * top.k)];
  const found = [];
  for (let n = i * top.k; n < (i + 1) * top.k; n++) if (keys[n] >= 0) found.push({ key: keys[n], weight: weights[n] });
  return found;
}

function drawLooks(i = state.query) {
  const { top } = layer();
  const { queries } = own();
  byId("looks").hidden = !top;
  byId("query").max = queries - 1;
  if (document.activeElement !== byId("query")) byId("query").value = i;
  for (const element of byId("tokens").querySelectorAll(".hit, [aria-selected='true']")) {
    element.classList.remove("hit");
    element.setAttribute("aria-selected", "false");
  }
  const token = tokenElement(keyOfQuery(i));
  token?.setAttribute("aria-selected", "true");
  for (const element of byId("tokens").children) element.tabIndex = -1;
  (token ?? byId("tokens").firstElementChild)?.setAttribute("tabindex", "0");
  if (!top) return;
  const found = looks(i);
  const lines = found.map(({ key, weight }) => {
    const line = row([String(key), visible(tokenAt(key) ?? ""), weight, ""]);
    line.children[1].className = "word";
    line.children[3].className = "bar-cell";
    const meter = Object.assign(document.createElement("span"), { className: "meter" });
    meter.style.width = `${100 * Math.min(1, weight)}%`;
    line.children[3].append(meter);
    const element = tokenElement(key);
    element?.classList.add("hit");
    element?.style.setProperty("--heavy", `${1 + 4 * weight}px`);
    return line;
  });
  const what = i < 0 || i >= queries ? "No query stands here: this key came from before"
    : `Query ${i}${quoted(keyOfQuery(i))} ${found.length ? "looks at" : "sees no key"}`;
  fill(byId("top"), what, ["key", "token", "weight", "share"], lines);
}

// A query was chosen; with `far` its token is brought into what is shown.
function ask(i, far = false) {
  state.query = Math.max(0, Math.min(i, own().queries - 1));
  const key = keyOfQuery(state.query);
  if (far && (key < state.first || key >= state.first + MOST)) {
    state.first = Math.max(0, key - MOST / 2);
    drawTokens();
  } else drawLooks();
}

function looksWords(i) {
  const words = looks(i).slice(0, 3).map(({ key, weight }) => `key ${key}${quoted(key)} ${short(weight)}`);
  return words.length ? `query ${i} looks at ${words.join(", ")}` : "no query, or it sees no key";
}

function tokenKey(e) {
  const at = Number(document.activeElement?.dataset.key ?? state.first);
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: state.first,
    End: Math.min(own().keys, state.first + MOST) - 1 }[e.key];
  if (to === undefined || to < 0 || to >= own().keys) return;
  e.preventDefault();
  if (to < state.first || to >= state.first + MOST) {
    state.first = to < state.first ? Math.max(0, to - MOST + 1) : to;
    drawTokens();
  }
  tokenElement(to).focus();
}

function startTokens() {
  const tokens = byId("tokens");
  byId("paint").addEventListener("change", drawTokens);
  byId("before").addEventListener("click", () => { state.first -= MOST; drawTokens(); });
  byId("after").addEventListener("click", () => { state.first += MOST; drawTokens(); });
  byId("query").addEventListener("input", () => { if (byId("query").value !== "") ask(Number(byId("query").value), true); });
  tokens.addEventListener("keydown", tokenKey);
  tokens.addEventListener("focusin", (e) => {
    if (e.target.dataset.key === undefined) return;
    const i = queryOfKey(Number(e.target.dataset.key));
    if (i >= 0 && i < own().queries) ask(i);
    else drawLooks(i);
    say(looksWords(i));
  });
  tokens.addEventListener("pointerover", (e) => {
    const key = e.target.dataset?.key;
    if (key === undefined) return;
    drawLooks(queryOfKey(Number(key)));
    const given = paint();
    tip(`key ${key}${given ? `\n${given.name} ${short(given.numbers[key])}` : ""}`, e);
  });
  tokens.addEventListener("pointerout", () => tip(""));
  tokens.addEventListener("pointerleave", () => drawLooks());
  tokens.addEventListener("click", (e) => {
    const key = e.target.dataset?.key;
    if (key !== undefined) ask(queryOfKey(Number(key)));
  });
  drawTokens();
}
