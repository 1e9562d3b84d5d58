"""The page in a real browser: it opens without a network, and what it shows are the numbers of the arrays.

Each window ends with a look at what the page complained of and what it asked the network for.
"""

import csv
import io
import json
import os
import re
import shutil
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import pytest

import tilefold as tf
from tilefold.view import page, statistics, write
from tilefold.view.colours import ramp

if find_spec("plotly") is None and not os.environ.get("CI"):
    pytest.skip("plotly is not installed", allow_module_level=True)

N, HEADS, NAMES = 500, 4, ("first", "second", "third")
TOKENS = [f"w{i}" for i in range(N)]
PATIENCE = 180_000  # milliseconds that a step may take on a busy machine
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def required(reason):
    """Skip the test; fail it where all must run."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set")
    pytest.skip(reason)


def drawn(*shape, seed=0):
    """Queries and keys."""
    return np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def seen():
    found = {}
    for seed, name in enumerate(NAMES):
        q, k = drawn(HEADS, N, 16, seed=seed)
        found[name] = tf.probe(q, k, *statistics(N, N, top=5), tf.max_logit(), causal=True, scale=0.5)
    return found


@pytest.fixture(scope="module")
def file(seen, tmp_path_factory):
    return write(seen, tmp_path_factory.mktemp("page") / "page.html", tokens=TOKENS, title="A & B")


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        required("playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        required(f"there is no browser: none of {', '.join(BROWSERS)}")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


@contextmanager
def windows(browser):
    """Opens files in windows that have no network; complaints of a page and requests fail at the end."""
    contexts, complaints, asked = [], [], []

    def open_file(file, ready="html[data-ready]", **options):
        context = browser.new_context(offline=True, viewport={"width": 1300, "height": 900}, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda said: complaints.append(said.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.resolve().as_uri())
        tab.wait_for_selector(ready, state="attached")
        return tab

    yield open_file
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture
def opened(browser):
    """Opens files, each in a window of its own."""
    with windows(browser) as open_file:
        yield open_file


@pytest.fixture(scope="module")
def window(browser, file):
    with windows(browser) as open_file:
        yield open_file(file)


@pytest.fixture
def tab(window):
    """The page in a window that several tests share, brought back to how it opens."""
    choose(window, NAMES[0], 0)
    window.select_option("#measure", "entropy mean")
    window.select_option("#scale", "log")
    window.click("[data-do=all]")
    window.fill("#query", "0")
    return window


def choose(tab, layer, head):
    tab.select_option("#layer", label=layer)
    tab.select_option("#head", str(head))


def map_shown(tab):
    """The numbers that the map draws, and where its bins lie."""
    data = tab.evaluate(
        "() => { const d = document.querySelector('#map .plot').data[0];"
        " return { z: d.z.map((r) => Array.from(r)), x: Array.from(d.x), y: Array.from(d.y) } }"
    )
    z = np.array([[np.nan if x is None else x for x in row] for row in data["z"]])
    return z, np.array(data["x"]), np.array(data["y"])


def view(tab):
    """The part that is shown, by the axes of the map: x0, x1, y0, y1."""
    layout = tab.evaluate(
        "() => { const l = document.querySelector('#map .plot').layout; return [...l.xaxis.range, ...l.yaxis.range] }"
    )
    return layout[0], layout[1], layout[3], layout[2]


def wait_for(tab, came):
    """What the browser tells a page later than it was done. (The page's policy keeps Playwright's own way out.)"""
    for _ in range(PATIENCE // 50):
        if came():
            return
        tab.wait_for_timeout(50)
    pytest.fail("it did not come")


def assert_shows(tab, exact, length=N):
    """The map shows those numbers, where it shows anything, at their places; hidden ones are left blank."""
    z, x, y = map_shown(tab)
    rows, cols = (np.arange(n + 1) * length // n for n in exact.shape)
    r, c = np.searchsorted(rows, y[:-1]), np.searchsorted(cols, x[:-1])
    assert np.array_equal(rows[r], y[:-1]) and np.array_equal(cols[c], x[:-1])
    want = exact[np.ix_(r, c)].astype(np.float64)
    assert z.shape == want.shape
    assert np.array_equal(np.nan_to_num(z, nan=0), want)
    x0, x1, y0, y1 = view(tab)
    assert x[0] <= x0 + 1e-9 and x[-1] >= x1 - 1e-9 and y[0] <= y0 + 1e-9 and y[-1] >= y1 - 1e-9


def cells(tab, selector):
    """The text of a table, line by line."""
    return tab.locator(f"{selector} tr").evaluate_all(
        "(rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
    )


def short(x):
    """A number as the page writes it."""
    return "0" if x == 0 else f"{x:.4g}"


def span(one, many, begin, end):
    """Rows or columns as the page names them."""
    return f"{one} {begin}" if end - begin == 1 else f"{many} {begin}–{end - 1}"


def test_it_opens_without_a_network(opened, file):
    tab = opened(file)
    assert tab.title() == "A & B"
    assert "3 layers · 4 heads · 500 queries · 500 keys" in tab.inner_text("header")
    assert tab.locator("#failed").is_hidden()
    for part in ("heads", "map", "profile"):
        assert tab.locator(f"#{part} .main-svg").first.is_visible()


def test_a_request_would_be_seen(browser, tmp_path):
    """The watch over the network is no blind one."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='https://example.org/x.png'>")
    context, asked = browser.new_context(offline=True), []
    tab = context.new_page()
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(bad.as_uri())
    context.close()
    assert "https://example.org/x.png" in asked


def test_heads_are_compared_by_their_entropy(tab, seen):
    z = tab.evaluate("() => document.querySelector('#heads .plot').data[0].z")
    want = [[float(seen[name].entropy[h].astype(float).mean()) for h in range(HEADS)] for name in NAMES]
    assert z == want
    tab.select_option("#measure", "max_logit largest")
    z = tab.evaluate("() => document.querySelector('#heads .plot').data[0].z")
    assert z == [[float(seen[name].max_logit[h].max()) for h in range(HEADS)] for name in NAMES]


def test_a_head_is_chosen_by_a_click(tab):
    box = tab.locator("#heads .nsewdrag").bounding_box()
    at = {"x": box["width"] * (2 + 0.5) / HEADS, "y": box["height"] * (1 + 0.5) / len(NAMES)}
    tab.locator("#heads .nsewdrag").click(position=at)
    assert tab.input_value("#layer") == "1"
    assert tab.input_value("#head") == "2"


def test_pointing_at_a_token_shows_what_it_looks_at(tab, seen):
    choose(tab, "second", 3)
    for i in (0, 3, 77):
        tab.hover(f"#tokens [data-key='{i}']")
        top = seen["second"].topk
        lines = cells(tab, "#top tbody")
        there = int((top.keys[3, i] >= 0).sum())
        assert len(lines) == there
        for line, key, weight in zip(lines, top.keys[3, i], top.weights[3, i], strict=False):
            assert line[:3] == [str(key), TOKENS[key], short(weight)]
        assert f"Query {i} “w{i}” looks at" in tab.inner_text("#top caption")
        hit = tab.locator("#tokens .hit").evaluate_all("(all) => all.map((e) => Number(e.dataset.key))")
        assert sorted(hit) == sorted(top.keys[3, i][:there])
    assert f"key 77\nkey_mass {short(seen['second'].key_mass[3, 77])}" == tab.inner_text("#tip")


def test_any_query_can_be_asked_for(tab, seen):
    """Those beyond the tokens that are shown, too."""
    tab.fill("#query", "499")
    keys = [int(line[0]) for line in cells(tab, "#top tbody")]
    assert keys == seen["first"].topk.keys[0, 499].tolist()
    assert tab.locator("#tokens [data-key='499']").get_attribute("aria-selected") == "true"


def test_tokens_are_coloured_by_key_mass(tab, seen):
    mass = seen["first"].key_mass[0].astype(np.float64)
    place = np.rint(np.sqrt(mass / mass.max()) * (len(ramp()) - 1)).astype(int)
    shown = tab.locator("#tokens [role=option]").evaluate_all("(all) => all.map((e) => e.style.background)")
    want = [tuple(int(ramp()[p][i : i + 2], 16) for i in (1, 3, 5)) for p in place]
    found = [tuple(map(int, re.findall(r"\d+", colour))) for colour in shown]
    wrong = [n for n, (a, b) in enumerate(zip(found, want, strict=False)) if a != b]
    assert len(found) == 400
    assert len(wrong) <= 2, "a place may round to either side"


def test_pointing_at_the_map_names_the_bin(tab, seen):
    choose(tab, "third", 1)
    box = tab.locator("#map .nsewdrag").bounding_box()
    r, c = 200, 40
    place = {"x": box["width"] * (c + 0.5) / 256, "y": box["height"] * (r + 0.5) / 256}
    tab.locator("#map .nsewdrag").hover(position=place)
    q0, q1, k0, k1 = (n * N // 256 for n in (r, r + 1, c, c + 1))
    words = tab.inner_text("#cell")
    for part in (span("query", "queries", q0, q1), span("key", "keys", k0, k1)):
        assert part in words
    assert words.endswith(f": {short(seen['third'].map_256[1, r, c])}")


def test_zooming_refines_to_the_right_numbers(tab, seen):
    tab.select_option("#scale", "linear")
    choose(tab, "second", 2)
    assert_shows(tab, seen["second"].map_256[2])
    assert "map 2 of 3 (256 × 256)" in tab.inner_text("#level")
    for _ in range(2):
        tab.click("[data-do=in]")
    assert view(tab) == (187.5, 312.5, 187.5, 312.5)
    assert "single cells; map 3 of 3 (500 × 500)" in tab.inner_text("#level")
    assert_shows(tab, seen["second"].map_500[2])
    tab.click("[data-do=left]")
    assert view(tab) == (125, 250, 187.5, 312.5)
    assert_shows(tab, seen["second"].map_500[2])
    tab.click("[data-do=all]")
    assert view(tab) == (0, N, 0, N)
    assert_shows(tab, seen["second"].map_256[2])


def test_dragging_and_the_wheel_zoom(tab, seen):
    tab.select_option("#scale", "linear")
    box = tab.locator("#map .nsewdrag").bounding_box()
    x, y, w, h = (box[name] for name in ("x", "y", "width", "height"))
    tab.mouse.move(x + w * 0.1, y + h * 0.5)
    tab.mouse.down()
    tab.mouse.move(x + w * 0.2, y + h * 0.55, steps=4)
    tab.mouse.move(x + w * 0.3, y + h * 0.7, steps=4)
    tab.mouse.up()
    wait_for(tab, lambda: view(tab)[1] < N)
    assert np.allclose(view(tab), (50, 150, 250, 350), atol=2)  # pixels are up to a cell wide
    assert_shows(tab, seen["first"].map_500[0])
    before = view(tab)
    tab.mouse.move(x + w / 2, y + h / 2)
    tab.mouse.wheel(0, -100)  # the drag has given the map the focus
    wait_for(tab, lambda: view(tab)[0] > before[0])
    assert np.isclose(view(tab)[1] - view(tab)[0], 0.8 * (before[1] - before[0]))
    assert_shows(tab, seen["first"].map_500[0])


def test_a_logarithmic_map_shows_logarithms(tab, seen):
    z, _, _ = map_shown(tab)
    exact = seen["first"].map_256[0].astype(np.float64)
    low = max(exact[exact > 0].min(), exact.max() * 1e-4)
    want = np.log10(np.maximum(np.where(exact > 0, exact, np.nan), low))
    assert np.array_equal(np.isnan(z), np.isnan(want))
    assert np.nanmax(np.abs(z - want)) < 1e-12


def test_the_line_is_the_statistic(tab, seen):
    choose(tab, "third", 3)
    for kind, name in (("rows", "mean_distance"), ("columns", "key_mass")):
        tab.select_option("#along", f"{kind}:{name}")
        y = tab.evaluate("() => document.querySelector('#profile .plot').data[0].y")
        assert np.array_equal(y, getattr(seen["third"], name)[3].astype(np.float64))
        assert name in tab.get_attribute("#profile", "aria-label")
    tab.click("#profile-details summary")
    wait_for(tab, lambda: cells(tab, "#profile-numbers tbody"))  # a page hears of it a moment later
    lines = cells(tab, "#profile-numbers tbody")
    assert [line[1] for line in lines[:9]] == [short(x) for x in seen["third"].key_mass[3, :9]]


def table_of(seen):
    """What the table must say, in float64."""
    lines = []
    for name in NAMES:
        one = seen[name]
        for h in range(HEADS):
            entropy, weight, distance, logit, mass = (
                getattr(one, s)[h].astype(np.float64)
                for s in ("entropy", "max_weight", "mean_distance", "max_logit", "key_mass")
            )
            lines.append(
                {
                    "layer": name,
                    "sequence": 0,
                    "head": h,
                    "entropy mean": entropy.mean(),
                    "entropy least": entropy.min(),
                    "max_weight largest": weight.max(),
                    "max_weight mean": weight.mean(),
                    "mean_distance mean": distance.mean(),
                    "max_logit largest": logit.max(),
                    "mass of top 5": one.topk.weights[h].astype(np.float64).sum(axis=-1).mean(),
                    "key_mass largest": mass.max(),
                    "key_mass at key": int(mass.argmax()),
                }
            )
    return lines


def test_the_table_and_its_files_are_the_arrays(tab, seen):
    want = table_of(seen)
    rows = cells(tab, "#numbers tbody")
    assert [row[1:] for row in rows] == [
        [short(x) if isinstance(x, float) else str(x) for x in list(line.values())[1:]] for line in want
    ]
    with tab.expect_download() as saved:
        tab.click("#json")
    assert saved.value.suggested_filename == "heads.json"
    assert json.loads(saved.value.path().read_text()) == want
    with tab.expect_download() as saved:
        tab.click("#csv")
    text = saved.value.path().read_text()
    found = [
        {k: type(line[k])(v) for k, v in row.items()}
        for row, line in zip(csv.DictReader(io.StringIO(text)), want, strict=True)
    ]
    assert found == want


def test_the_table_sorts_and_chooses(opened, file, seen):
    tab = opened(file)
    want = sorted(table_of(seen), key=lambda line: -line["entropy mean"])
    for _ in range(2):
        tab.click("#numbers thead button >> text='entropy mean'")
    assert tab.locator("#numbers th[aria-sort=descending]").inner_text().startswith("entropy mean")
    with tab.expect_download() as saved:
        tab.click("#json")
    assert json.loads(saved.value.path().read_text()) == want
    tab.locator("#numbers tbody tr").first.click()
    assert tab.locator("#layer option:checked").inner_text() == want[0]["layer"]
    assert tab.input_value("#head") == str(want[0]["head"])


def focused(tab):
    return tab.evaluate(
        "() => document.activeElement.id || document.activeElement.dataset.do || document.activeElement.dataset.key"
    )


def tab_to(tab, name, most=60):
    """Press Tab until that has the focus."""
    for _ in range(most):
        if focused(tab) == name:
            return
        tab.keyboard.press("Tab")
    pytest.fail(f"Tab does not reach {name}")


def test_the_keyboard_alone_is_enough(opened, file, seen):
    tab = opened(file)
    tab.keyboard.press("Tab")
    assert tab.evaluate("() => document.activeElement.className") == "skip"
    tab_to(tab, "theme")
    tab.keyboard.press("Enter")
    assert tab.inner_text("#theme") == "Theme: light"
    tab_to(tab, "heads")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        tab.keyboard.press(key)
    assert (tab.input_value("#layer"), tab.input_value("#head")) == ("1", "2")
    assert (
        tab.inner_text("#said") == f"second, head 2: entropy mean {short(table_of(seen)[6]['entropy mean'])}"
    )
    tab_to(tab, "map")
    for key in ("+", "+"):
        tab.keyboard.press(key)
    assert "queries 187 to 312, keys 187 to 312, single cells" in tab.inner_text("#said")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        tab.keyboard.press(key)
    weight = seen["second"].map_500[2, 189, 187]
    assert tab.inner_text("#said") == f"query 189 “w189” → key 187 “w187”: {short(weight)}"
    assert tab.inner_text("#cell") == tab.inner_text("#said")
    tab.keyboard.press("Enter")
    assert tab.input_value("#query") == "189"
    tab.keyboard.press("0")
    assert view(tab) == (0, N, 0, N)
    tab_to(tab, "189")
    tab.keyboard.press("ArrowRight")
    assert focused(tab) == "190"
    key = seen["second"].topk.keys[2, 190, 0]
    assert tab.inner_text("#said").startswith(f"query 190 looks at key {key} “w{key}”")
    tab_to(tab, "csv")
    with tab.expect_download() as saved:
        tab.keyboard.press("Enter")
    assert saved.value.suggested_filename == "heads.csv"


def test_light_and_dark(opened, file):
    background = "getComputedStyle(document.body).backgroundColor"
    scale = "document.querySelector('#map .plot').data[0].colorscale.map((c) => c[1])"
    tab = opened(file, color_scheme="dark")
    assert tab.evaluate(background) == "rgb(15, 17, 21)"
    assert tab.evaluate(scale) == list(ramp()[::-1])
    tab.click("#theme")
    assert tab.evaluate(background) == "rgb(246, 246, 243)"
    assert tab.evaluate(scale) == list(ramp())
    tab.click("#theme")
    assert tab.evaluate(background) == "rgb(15, 17, 21)"
    tab.click("#theme")
    tab.emulate_media(color_scheme="light")
    wait_for(tab, lambda: tab.evaluate(background) == "rgb(246, 246, 243)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_rules_of_accessibility(opened, file, scheme):
    """axe-core's rules: names, roles, contrast, order of headings and so on."""
    try:
        from axe_playwright_python.sync_playwright import Axe
    except ModuleNotFoundError:
        required("axe-playwright-python is not installed")
    tab = opened(file, color_scheme=scheme, bypass_csp=True)
    for details in ("profile", "map"):
        tab.click(f"#{details}-details summary")
    found = Axe().run(tab).response["violations"]
    assert [(rule["id"], [node["target"] for node in rule["nodes"]]) for rule in found] == []


def test_words_from_outside_are_no_markup(opened, tmp_path):
    evil = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1><b>"
    q, k = drawn(2, 8, 4)
    one = tf.probe(q, k, *statistics(8, 8), causal=True)
    tab = opened(write({evil: one, "b": one}, tmp_path / "p.html", tokens=[evil] * 8, title=evil))
    tab.hover("#tokens [data-key='3']")
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.hit") is None
    assert tab.inner_text("h1") == evil
    assert tab.locator("#tokens [data-key='3']").inner_text() == evil
    assert tab.locator("main b").count() == 0


def test_without_its_program_the_table_is_whole(opened, file, seen):
    tab = opened(file, ready="#numbers", java_script_enabled=False)
    assert tab.locator("#numbers tbody tr").count() == HEADS * len(NAMES)
    assert short(table_of(seen)[5]["entropy mean"]) in tab.inner_text("#numbers")


def test_what_was_not_asked_for_is_named(opened, tmp_path):
    q, k = drawn(2, 20, 4)
    tab = opened(write(tf.probe(q, k, tf.entropy()), tmp_path / "p.html"))
    for part in ("map-card", "tokens-card"):
        assert tab.locator(f"#{part}").is_hidden()
    for name in ("heatmap(64, 64)", "key_mass()", "topk(8)"):
        assert name in tab.inner_text("#notes")
    assert "entropy()" not in tab.inner_text("#notes").partition("For all of it")[0]
    tab = opened(write(tf.probe(q, k, tf.heatmap(4, 4)), tmp_path / "map.html"))
    assert tab.locator("#map-card").is_visible()
    assert tab.locator("#profile-card").is_hidden()


def test_padded_sequences_have_their_own_lengths(opened, tmp_path):
    q, k = (x.reshape(2, 2, 40, 8) for x in drawn(4, 40, 8))
    ends = np.array([40, 12])
    options = {"q_lengths": ends, "kv_lengths": ends}
    one = tf.probe(q, k, *statistics(40, 40, top=3), causal=True, **options)
    tab = opened(write(one, tmp_path / "p.html", tokens=[TOKENS[:40], TOKENS[:12]], **options))
    tab.select_option("#scale", "linear")
    assert_shows(tab, one.map_40[0, 0], 40)
    tab.select_option("#sequence", "1")
    tab.select_option("#head", "1")
    alone = tf.probe(q[1, :, :12], k[1, :, :12], *statistics(12, 12, top=3), causal=True)
    z, x, y = map_shown(tab)
    assert np.array_equal(x, np.arange(13)) and np.array_equal(y, np.arange(13))
    assert np.allclose(np.nan_to_num(z, nan=0), alone.map_12[1], atol=1e-6)
    assert tab.locator("#tokens [role=option]").count() == 12
    tab.fill("#query", "11")
    assert [int(line[0]) for line in cells(tab, "#top tbody")] == alone.topk.keys[1, 11].tolist()
    row = next(row for row in cells(tab, "#numbers tbody") if row[1:3] == ["1", "1"])
    assert row[1:4] == ["1", "1", short(alone.entropy[1].astype(np.float64).mean())]


def test_statistics_of_groups_stand_at_each_of_their_heads(opened, tmp_path):
    q, k = drawn(4, 30, 8)
    one = tf.probe(q, k[:2], tf.entropy(), tf.key_mass(heads="group"), causal=True)
    tab = opened(write(one, tmp_path / "p.html"))
    tab.select_option("#along", "columns:key_mass")
    for head in range(4):
        tab.select_option("#head", str(head))
        y = tab.evaluate("() => document.querySelector('#profile .plot').data[0].y")
        assert np.array_equal(y, one.key_mass[head // 2].astype(np.float64))


def test_decoding_steps_stand_side_by_side(opened, tmp_path):
    """Several calls of one layer, the second with one query on one key more."""
    q, k = drawn(2, 9, 8)
    calls = [
        tf.probe(q[:, :8], k[:, :8], *statistics(8, 8, top=3), causal=True),
        tf.probe(q[:, 8:], k, *statistics(1, 9, top=3), causal=True),
    ]
    tab = opened(write({"layer": calls}, tmp_path / "p.html", tokens=TOKENS[:9]))
    tab.select_option("#layer", label="layer [1]")
    assert tab.locator("#tokens [role=option]").count() == 9
    assert "Query 0 “w8” looks at" in tab.inner_text("#top caption")
    tab.hover("#tokens [data-key='2']")
    assert "No query stands here" in tab.inner_text("#top caption")


def test_tensors_are_shown_like_arrays(seen):
    torch = pytest.importorskip("torch")
    q, k = drawn(2, 50, 8)
    what = statistics(50, 50)
    from_tensors = tf.probe(torch.from_numpy(q), torch.from_numpy(k), *what, causal=True)
    assert page(from_tensors) == page(tf.probe(q, k, *what, causal=True))
