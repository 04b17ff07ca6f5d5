// The page: what is in view, its address, and the ways to find a unit.

const byId = (id) => document.getElementById(id);
const ROWS = 50; // of the list, shown at first

// What is in view: for each set a place { unit, cut, cluster }, which set is read, and whether both are.
const view = { set: 0, beside: false, places: index.sets.map(() => null) };
const panes = index.sets.map((_, number) => new Pane(number, { visit, adjust, say }));

const set = () => index.sets[view.set];

function say(text) { byId("said").textContent = text; }

// Address ----------------------------------------------------------------------------------------------------------------

// #set=neurons-1&unit=217&cluster=2&cut=0.4, and beside=topk.12.0.0.5 for the place in the other set.
function addressOf(number, { unit, cluster, cut, example }, beside = null) {
  const pairs = [["set", index.sets[number].key], ["unit", unit]];
  if (example !== undefined) pairs.push(["example", example]);
  else if (cluster) pairs.push(["cluster", cluster]);
  if (cut !== undefined && cut !== index.sets[number].threshold) pairs.push(["cut", cut]);
  if (beside !== null) {
    const { unit: other, cluster: its = 0, cut: at } = view.places[beside];
    pairs.push(["beside", [index.sets[beside].key, other, its, at ?? index.sets[beside].threshold].join(":")]);
  }
  return `#${new URLSearchParams(pairs).toString().replaceAll("%3A", ":")}`;
}

// The place that an address names; what it does not name, or names wrongly, is null.
function readAddress(hash) {
  const asked = new URLSearchParams(hash.replace(/^#/, ""));
  const placeIn = (key, unit, rest) => {
    const number = index.sets.findIndex((each) => each.key === key);
    const valid = number >= 0 && /^\d+$/.test(unit ?? "") && Number(unit) < index.sets[number].n;
    const known = Object.entries(rest).filter(([, text]) => text !== null && text !== "" && Number(text) >= 0);
    return valid ? { number, place: { unit: Number(unit), ...Object.fromEntries(known.map(([name, text]) => [name, Number(text)])) } } : null;
  };
  const rest = { cluster: asked.get("cluster"), cut: asked.get("cut"), example: asked.get("example") };
  const own = placeIn(asked.get("set") ?? index.sets[0].key, asked.get("unit"), rest);
  const [key, unit, cluster, cut] = (asked.get("beside") ?? "").split(":");
  const beside = placeIn(key, unit, { cluster: cluster ?? null, cut: cut ?? null });
  return { own, beside: beside?.number === own?.number ? null : beside };
}

// Back and forward lead through what was visited here, and never out of the page.
const trail = { at: 0, addresses: [] };

function write(push) {
  const address = addressOf(view.set, view.places[view.set], view.beside ? 1 - view.set : null);
  if (push) trail.addresses.splice(++trail.at);
  try {
    history[push ? "pushState" : "replaceState"]({ at: trail.at }, "", location.href.split("#")[0] + address);
  } catch {
    if (push) location.hash = address; // a page inside a notebook has no address of its own to write
  }
  trail.addresses[trail.at] = location.hash;
  showTrail();
}

function showTrail() {
  byId("back").disabled = trail.at === 0;
  byId("forward").disabled = trail.at >= trail.addresses.length - 1;
}

async function follow({ state }) {
  const { at, addresses } = trail, hash = location.hash;
  if (hash === addresses[at] && (state?.at ?? at) === at) return;
  const known = state?.at ?? [at - 1, at + 1].find((step) => addresses[step] === hash);
  trail.at = known ?? at + 1;
  if (known === undefined) addresses.splice(trail.at);
  const { own, beside } = readAddress(hash);
  if (!own) return;
  view.set = own.number;
  view.beside = beside !== null;
  view.places[own.number] = own.place;
  if (beside) view.places[beside.number] = beside.place;
  if (await render()) write(false);
}

// Goes to a unit of a set and remembers the way back. The cut stays: heights of different units are of one kind.
async function visit(number, place) {
  view.set = number;
  view.places[number] = { cut: view.places[number].cut, ...place };
  if (!(await render())) return; // the reader has gone on meanwhile
  write(true);
  noteVisit();
  const { unit } = view.places[number];
  say(`${nounOf(set())} ${unit}: ${panes[number].find(".summary").textContent || panes[number].find(".none").textContent}`);
  if (byId("finder").classList.contains("open")) toggleFinder(false);
  if (document.activeElement.tagName !== "BUTTON") panes[number].find("h2").focus({ preventScroll: true });
  const top = panes[number].root.getBoundingClientRect().top;
  if (top < 0) panes[number].root.scrollIntoView();
}

// What is in view of a unit changed: the address follows, the history does not.
function adjust(number, place) {
  view.places[number] = place;
  if (number !== view.set && view.beside) takeUp(number);
  write(false);
}

let renders = 0;

async function render() {
  const own = ++renders, shown = view.beside ? index.sets.map((_, number) => number) : [view.set];
  const roots = shown.map((number) => panes[number].root), inPlace = [...byId("panes").children];
  if (roots.length !== inPlace.length || roots.some((root, i) => root !== inPlace[i])) byId("panes").replaceChildren(...roots);
  byId("panes").classList.toggle("beside", view.beside);
  byId("beside").checked = view.beside;
  takeUp(view.set);
  for (const number of shown) {
    try {
      view.places[number] = (await panes[number].show(view.places[number])) ?? view.places[number];
    } catch (error) {
      trouble(error);
    }
  }
  if (own !== renders) return false;
  document.title = `${nounOf(set())} ${view.places[view.set].unit} · ${index.title}`;
  markCurrent();
  return true;
}

// The set that the finder speaks of; of two side by side, the one that was touched last.
function takeUp(number) {
  view.set = number;
  panes.forEach((pane, each) => pane.root.classList.toggle("current", each === number));
  if (finder.set !== number) showFinder();
}

function trouble(error) {
  const old = typeof DecompressionStream === "undefined";
  byId("trouble").hidden = false;
  byId("trouble").textContent = old
    ? "This browser cannot unpack the page's data: please use one of 2023 or later."
    : `The page's data could not be read: ${error.message}`;
}

// Finder: sort, filter, search ------------------------------------------------------------------------------------------------

const SORTS = [
  ["number", "number", 1],
  ["mean_distance", "polysemanticity", -1],
  ["clusters", "clusters", -1],
  ["frequency", "frequency", -1],
  ["examples", "examples", -1],
  ["maximum", "largest activation", -1],
];
const RANGES = [
  ["mean_distance", "Polysemanticity", 1],
  ["frequency", "Frequency, %", 100],
  ["clusters", "Clusters", 1],
];
const finder = { set: null, turn: 1, rows: ROWS, found: null, told: "", units: [] };

const orderOf = (name) => SORTS.find(([each]) => each === name)[2];

function showFinder() {
  const { n, key } = set();
  finder.set = view.set;
  finder.found = null;
  byId("number").max = n - 1;
  byId("number").placeholder = `${nounOf(set())}, 0 to ${n - 1}`;
  for (const radio of byId("sets").querySelectorAll("input")) radio.checked = radio.value === key;
  if (byId("query").value.trim()) runSearch();
  else list();
}

function list() {
  const { summary, n } = set();
  const status = byId("status").value, sort = byId("sort").value;
  const bounds = RANGES.map(([name, , scale]) => {
    const [low, high] = ["low", "high"].map((end) => byId(`${name}-${end}`).value);
    return [summary[name], low === "" ? -Infinity : low / scale, high === "" ? Infinity : high / scale, low + high !== ""];
  }).filter(([, , , bounded]) => bounded);
  const fits = (unit) =>
    (status === "all" || status === statusOf(summary, unit)) &&
    (finder.found === null || finder.found.has(unit)) &&
    bounds.every(([values, low, high]) => values[unit] !== null && values[unit] >= low && values[unit] <= high);
  finder.units = Array.from({ length: n }, (_, unit) => unit).filter(fits);
  const value = sort === "number" ? (unit) => unit : (unit) => summary[sort][unit];
  finder.units.sort((a, b) => {
    const [one, other] = [value(a), value(b)];
    if (one === null || other === null) return (one === null) - (other === null) || a - b; // the undefined come last
    return (one - other) * finder.turn || a - b;
  });
  finder.rows = ROWS;
  const of = finder.units.length === n ? "" : ` of ${n.toLocaleString("en")}`;
  byId("count").textContent = `${finder.units.length.toLocaleString("en")}${of} ${nounOf(set())}s${finder.told}`;
  showRows();
}

const statusOf = ({ examples, frequency }, unit) => (examples[unit] ? "shown" : frequency[unit] ? "quiet" : "dead");

function showRows() {
  byId("list").replaceChildren(...finder.units.slice(0, finder.rows).map(rowOf));
  const left = finder.units.length - finder.rows;
  const sort = byId("sort").value;
  byId("measure").textContent = SORTS.find(([name]) => name === (sort === "number" ? "mean_distance" : sort))[1];
  byId("more").hidden = left <= 0;
  byId("more").textContent = `Show ${Math.min(left, 4 * ROWS)} more of ${left.toLocaleString("en")}`;
  markCurrent();
}

function rowOf(unit) {
  const { summary, keys } = set(), found = finder.found?.get(unit);
  const named = byId("sort").value === "number" ? "mean_distance" : byId("sort").value;
  const value = summary[named][unit];
  const status = statusOf(summary, unit);
  const text = status !== "shown" ? status : named === "frequency" ? percent(value) : rounded(value, Number.isInteger(value) && named !== "maximum" ? 0 : 2);
  const bar = make("i", { "aria-hidden": "true" });
  if (status === "shown" && value !== null) bar.style.setProperty("--share", shareBelow(set(), named, value).toFixed(3));
  const place = found?.example === undefined ? { unit } : { unit, example: found.example };
  const words = found?.count ? counted(found.count, "text") : (keys?.[unit] ?? []).map((id) => make("bdi", {}, wordOf(index.vocab[id])));
  return make(
    "li", { "data-unit": unit },
    panes[view.set].link(view.set, place, make("b", {}, String(unit)), make("span", { class: "words" }, words), bar, make("span", { class: "value" }, text)),
  );
}

function markCurrent() {
  const unit = view.places[view.set]?.unit;
  finder.dots = drawOverview(byId("overview").firstElementChild, set().summary, finder.units, unit);
  for (const row of byId("list").children) {
    if (Number(row.dataset.unit) === unit) row.firstChild.setAttribute("aria-current", "true");
    else row.firstChild.removeAttribute("aria-current");
  }
}

// The unit whose dot is nearest to a place on the overview, if one is near.
function unitNear({ clientX, clientY }) {
  const box = byId("overview").firstElementChild.getBoundingClientRect();
  let best = null, least = 144;
  for (const [unit, [x, y]] of finder.dots) {
    const far = (x - clientX + box.left) ** 2 + (y - clientY + box.top) ** 2;
    if (far < least) [best, least] = [unit, far];
  }
  return best;
}

let searches = 0;

async function runSearch() {
  const query = byId("query").value, own = ++searches, inTexts = document.querySelector("[name=where]:checked").value === "text";
  finder.told = "";
  finder.found = null;
  if (!plain(query)) return list();
  if (inTexts) {
    const report = (share) => { if (own === searches) byId("count").textContent = `Reading the texts: ${Math.round(100 * share)} %`; };
    const found = await searchText(set(), query, report);
    if (own !== searches) return;
    finder.found = found;
    finder.told = ` with a text that holds ${quoted(query)}`;
  } else {
    const { tokens, units } = searchTokens(set(), query);
    finder.found = new Map(units.map((unit) => [unit, {}]));
    const shown = tokens.slice(0, 3).map((token) => visibleToken(token)).join(", ");
    finder.told = units.length
      ? ` with the key token ${shown}${tokens.length > 3 ? ` and ${tokens.length - 3} more` : ""}`
      : ` with a key token that begins with ${quoted(query)}`;
  }
  list();
  say(byId("count").textContent);
}

function step(direction) {
  const units = finder.units, now = units.indexOf(view.places[view.set].unit);
  const next = now < 0 ? units[0] : units[now + direction];
  if (next !== undefined) visit(view.set, { unit: next });
}

function random() {
  const others = finder.units.filter((unit) => set().summary.examples[unit] && unit !== view.places[view.set].unit);
  if (others.length) visit(view.set, { unit: others[Math.floor(Math.random() * others.length)] });
}

const visited = [];

function noteVisit() {
  const number = view.set, { unit } = view.places[number];
  const old = visited.findIndex((each) => each.number === number && each.unit === unit);
  if (old >= 0) visited.splice(old, 1);
  visited.unshift({ number, unit });
  visited.splice(20);
  byId("visits").hidden = visited.length < 2;
  byId("visited").replaceChildren(...visited.map((each) => {
    const { key, name } = index.sets[each.number];
    const label = `${nounOf(index.sets[each.number])} ${each.unit}${index.sets.length > 1 ? `, ${name}` : ""}`;
    return make("li", { "data-set": key }, panes[each.number].link(each.number, { unit: each.unit }, label));
  }));
}

// Keys, colours, dialogs ----------------------------------------------------------------------------------------------------------

const KEYS = [
  ["/", "search", () => { toggleFinder(true); byId("query").focus(); }],
  ["g", "go to a number", () => { toggleFinder(true); byId("number").focus(); }],
  ["r", "a random one of the list", random],
  ["j", "the next of the list", () => step(1)],
  ["k", "the one before", () => step(-1)],
  ["b", "back", () => byId("back").click()],
  ["f", "forward", () => byId("forward").click()],
  ["[", "fewer clusters", () => panes[view.set].find(".fewer").click()],
  ["]", "more clusters", () => panes[view.set].find(".finer").click()],
  ["0", "the usual cut", () => panes[view.set].find(".usual").click()],
  ["i", "activation or importance", () => panes[view.set].find(".options input:not(:checked)").click()],
  ["s", "the other set", () => index.sets.length > 1 && swap()],
  ["t", "light or dark", () => byId("theme").click()],
  ["?", "these keys", () => byId("help-box").showModal()],
];

const swap = () => byId("sets").querySelector("input:not(:checked)").click();

const stored = {
  get(name) { try { return localStorage.getItem(`explorer-${name}`); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(`explorer-${name}`, value); } catch { /* a page from disk may keep nothing */ } },
};

function paint(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
  byId("theme").textContent = { system: "◐", light: "○", dark: "●" }[theme];
  stored.set("theme", theme);
}

function toggleFinder(open) {
  byId("finder").classList.toggle("open", open);
  byId("browse").setAttribute("aria-expanded", String(open));
}

function setUp() {
  document.querySelector("h1").textContent = index.title;
  document.body.append(tip.box);
  byId("skip").addEventListener("click", () => panes[view.set].find(".tabs [tabindex='0']")?.focus());

  if (index.sets.length > 1) {
    byId("sets").hidden = byId("beside-label").hidden = false;
    byId("sets").append(...index.sets.map(({ key, name }) =>
      make("label", {}, make("input", { type: "radio", name: "set", value: key }), ` ${name}`)));
  }
  byId("sets").addEventListener("change", ({ target }) => {
    const number = index.sets.findIndex(({ key }) => key === target.value);
    if (view.beside) { takeUp(number); write(false); panes[number].root.scrollIntoView({ block: "nearest" }); }
    else visit(number, view.places[number]);
  });
  byId("beside").addEventListener("change", async ({ target }) => {
    view.beside = target.checked;
    await render();
    write(false);
  });

  panes.forEach((pane, number) => pane.root.addEventListener("focusin", () => takeUp(number)));

  byId("by-number").addEventListener("submit", (event) => {
    event.preventDefault();
    visit(view.set, { unit: Number(byId("number").value) });
    byId("number").value = "";
  });
  byId("random").addEventListener("click", random);
  byId("back").addEventListener("click", () => history.back());
  byId("forward").addEventListener("click", () => history.forward());
  addEventListener("popstate", follow);

  let pause;
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(pause); runSearch(); });
  byId("search").addEventListener("input", () => { clearTimeout(pause); pause = setTimeout(runSearch, 250); });

  byId("sort").append(...SORTS.map(([name, label]) => make("option", { value: name }, label)));
  const turn = (to) => {
    finder.turn = to;
    byId("turn").textContent = to > 0 ? "↑" : "↓";
    byId("turn").setAttribute("aria-label", `Order: ${to > 0 ? "smallest" : "largest"} first`);
  };
  byId("sort").addEventListener("change", ({ target }) => { turn(orderOf(target.value)); list(); });
  byId("turn").addEventListener("click", () => { turn(-finder.turn); list(); });
  byId("ranges").append(...RANGES.map(([name, label]) => make(
    "fieldset", { class: "range" }, make("legend", { class: "label" }, label),
    ...[["low", "from"], ["high", "to"]].map(([end, placeholder]) =>
      make("input", { type: "number", step: "any", min: 0, id: `${name}-${end}`, placeholder, "aria-label": `${label} ${placeholder}` })),
  )));
  byId("filters").addEventListener("input", list);
  byId("clear").addEventListener("click", () => {
    byId("status").value = "all";
    for (const input of byId("ranges").querySelectorAll("input")) input.value = "";
    list();
  });
  const overview = byId("overview").firstElementChild;
  overview.addEventListener("pointermove", (event) => {
    const unit = unitNear(event), { mean_distance: distance, frequency } = set().summary;
    if (unit === null) return tip.hide();
    const { clientX: left, clientY: y } = event, told = `${rounded(distance[unit])}, active on ${percent(frequency[unit])}`;
    tip.showAt({ left, top: y - 6, bottom: y + 6, width: 0 }, `${nounOf(set())} ${unit}`, told);
  });
  overview.addEventListener("pointerleave", () => tip.hide());
  overview.addEventListener("click", (event) => unitNear(event) !== null && visit(view.set, { unit: unitNear(event) }));
  byId("more").addEventListener("click", () => { finder.rows += 4 * ROWS; showRows(); });
  byId("browse").addEventListener("click", () => toggleFinder(!byId("finder").classList.contains("open")));

  byId("theme").addEventListener("click", () => {
    const themes = ["system", "light", "dark"];
    paint(themes[(themes.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % 3]);
    say(byId("theme").getAttribute("aria-label"));
  });
  paint(stored.get("theme") ?? "system");
  byId("help").addEventListener("click", () => byId("help-box").showModal());
  byId("about").addEventListener("click", () => byId("about-box").showModal());
  byId("help-box").querySelector("dl").append(...KEYS.map(([key, meaning]) => make("div", {}, make("dt", {}, make("kbd", {}, key)), make("dd", {}, meaning))));
  byId("about-box").querySelector("div").append(...index.sets.map(({ name, model, site, facts = {} }) => make(
    "section", {}, make("h3", {}, name),
    make("dl", {}, [["model", model], ["site", site], ...Object.entries(facts)].map(([fact, text]) => make("div", {}, make("dt", {}, fact), make("dd", {}, String(text))))),
  )));

  byId("single-keys").checked = stored.get("single-keys") !== "off";
  byId("single-keys").addEventListener("change", ({ target }) => stored.set("single-keys", target.checked ? "on" : "off"));
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") { tip.hide(); toggleFinder(false); }
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.matches("input:not([type=radio], [type=checkbox]), select, textarea")) return;
    const known = byId("single-keys").checked && KEYS.find(([key]) => key === event.key);
    if (!known) return;
    event.preventDefault();
    known[2]();
  });
  addEventListener("scroll", () => tip.hide(), { passive: true });
}

// The first unit with something to tell: with examples in several clusters, or with examples, or any.
function firstUnit({ summary }) {
  const several = summary.clusters.findIndex((clusters) => clusters > 1);
  return Math.max(0, several >= 0 ? several : summary.examples.findIndex((examples) => examples > 0));
}

async function start() {
  setUp();
  const { own, beside } = readAddress(location.hash);
  view.places = index.sets.map((each) => ({ unit: firstUnit(each) }));
  for (const each of [own, beside]) if (each) view.places[each.number] = each.place;
  view.set = own?.number ?? 0;
  view.beside = beside !== null || (own === null && index.sets.length > 1 && innerWidth >= 1100);
  await render();
  write(false);
  noteVisit();
}

start().catch(trouble);
