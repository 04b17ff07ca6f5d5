// The page: what is in view, its address, its keys and colours.

const byId = (id) => document.getElementById(id);

// What is in view: for each set a place { unit, cut, cluster }, which set is read, and whether both are.
const view = { set: 0, beside: false, places: index.sets.map(() => null) };
const panes = index.sets.map((_, number) => new Pane(number, { visit, adjust, say }));

const set = () => index.sets[view.set];

function say(text) { byId("said").textContent = text; }

// Address -------------------------------------------------------------------------------------------------------------

// #set=neurons-1&unit=217&cluster=2&cut=0.4, and beside=topk:12:0:0.5 for the place in the other set.
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
    const numbers = Object.fromEntries(known.map(([name, text]) => [name, Number(text)]));
    return valid ? { number, place: { unit: Number(unit), ...numbers } } : null;
  };
  const rest = { cluster: asked.get("cluster"), cut: asked.get("cut"), example: asked.get("example") };
  const own = placeIn(asked.get("set") ?? index.sets[0].key, asked.get("unit"), rest);
  const [key, unit, cluster, cut] = (asked.get("beside") ?? "").split(":");
  const beside = placeIn(key, unit, { cluster: cluster ?? null, cut: cut ?? null });
  return { own, beside: beside?.number === own?.number ? null : beside };
}

// Back and forward lead through what was visited here, and never out of the page. A step has its address, and the part
// of the browser's own that tells it apart: a page inside a notebook has no address that it may always write.
const trail = { at: 0, steps: [] };

function write(push) {
  const address = addressOf(view.set, view.places[view.set], view.beside ? 1 - view.set : null);
  if (push) trail.steps.splice(++trail.at);
  try {
    history[push ? "pushState" : "replaceState"]({ at: trail.at }, "", location.href.split("#")[0] + address);
  } catch {
    if (push) {
      trail.steps[trail.at] = { address, hash: address }; // known before the browser tells of it
      location.hash = address;
    }
  }
  trail.steps[trail.at] = { address, hash: location.hash };
  showTrail();
}

function showTrail() {
  byId("back").disabled = trail.at === 0;
  byId("forward").disabled = trail.at >= trail.steps.length - 1;
}

async function follow({ state }) {
  const { at, steps } = trail, { hash } = location;
  if (hash === steps[at].hash && (state?.at ?? at) === at) return;
  const known = state?.at ?? [at - 1, at + 1].find((step) => steps[step]?.hash === hash);
  trail.at = known ?? at + 1;
  if (known === undefined) steps.splice(trail.at);
  const { own, beside } = readAddress(steps[trail.at]?.address ?? hash);
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
  say(`${nounOf(set())} ${unit}: ${panes[number].told}`);
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
  if (String(shown) !== byId("panes").dataset.shown) {
    byId("panes").replaceChildren(...shown.map((number) => panes[number].root));
  }
  byId("panes").dataset.shown = String(shown);
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
    ? "This browser cannot unpack the page's data: please use one of 2024 or later."
    : `The page's data could not be read: ${error.message}`;
}

// Keys, colours, dialogs ----------------------------------------------------------------------------------------------

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
  get(name) {
    try { return localStorage.getItem(`explorer-${name}`); } catch { return null; }
  },
  set(name, value) {
    try { localStorage.setItem(`explorer-${name}`, value); } catch { /* some pages may keep nothing */ }
  },
};

function paint(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
  byId("theme").textContent = { system: "◐", light: "○", dark: "●" }[theme];
}

// Inside a page with a theme of its own, such as the book's, the colours follow it.
function followFrame() {
  try {
    const outer = parent.document.documentElement;
    const take = () => ["light", "dark"].includes(outer.dataset.theme) && paint(outer.dataset.theme);
    if (parent === window) return;
    new MutationObserver(take).observe(outer, { attributeFilter: ["data-theme"] });
    take();
  } catch { /* from disk a page may not look at the one around it */ }
}

function toggleFinder(open) {
  byId("finder").classList.toggle("open", open);
  byId("browse").setAttribute("aria-expanded", String(open));
}

function setUpSets() {
  if (index.sets.length > 1) {
    byId("sets").hidden = byId("beside-label").hidden = false;
    const alike = index.sets[0].kind === index.sets[1].kind;
    byId("sets").classList.toggle("stacked", alike);
    byId("sets").append(...index.sets.map((each) => make(
      "label", { title: each.name },
      make("input", { type: "radio", name: "set", value: each.key }), alike ? each.name : counted(each.n, nounOf(each)),
    )));
  }
  byId("sets").addEventListener("change", ({ target }) => {
    const number = index.sets.findIndex(({ key }) => key === target.value);
    if (!view.beside) return visit(number, view.places[number]);
    takeUp(number);
    write(false);
    panes[number].root.scrollIntoView({ block: "nearest" });
  });
  byId("beside").addEventListener("change", async ({ target }) => {
    view.beside = target.checked;
    await render();
    write(false);
  });
  panes.forEach((pane, number) => pane.root.addEventListener("focusin", () => takeUp(number)));
  byId("back").addEventListener("click", () => history.back());
  byId("forward").addEventListener("click", () => history.forward());
  addEventListener("popstate", follow);
}

function setUpTools() {
  const pair = (term, text) => make("div", {}, make("dt", {}, term), make("dd", {}, text));
  byId("theme").addEventListener("click", () => {
    const themes = ["system", "light", "dark"];
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % 3];
    paint(next);
    stored.set("theme", next);
    say(byId("theme").getAttribute("aria-label"));
  });
  paint(stored.get("theme") ?? "system");
  followFrame();
  byId("help").addEventListener("click", () => byId("help-box").showModal());
  byId("help-box").querySelector("dl").append(...KEYS.map(([key, meaning]) => pair(make("kbd", {}, key), meaning)));
  byId("about").addEventListener("click", () => byId("about-box").showModal());
  byId("about-box").querySelector("div").append(...index.sets.map(({ name, model, site, facts = {} }) => make(
    "section", {}, make("h3", {}, name),
    make("dl", {}, Object.entries({ model, site, ...facts }).map(([fact, text]) => pair(fact, String(text)))),
  )));
  byId("browse").addEventListener("click", () => toggleFinder(!byId("finder").classList.contains("open")));
  byId("skip").addEventListener("click", () => panes[view.set].find(".tabs [tabindex='0']")?.focus());
  addEventListener("scroll", () => tip.hide(), { passive: true });
}

function setUpKeys() {
  const allowed = byId("single-keys");
  allowed.checked = stored.get("single-keys") !== "off";
  allowed.addEventListener("change", () => stored.set("single-keys", allowed.checked ? "on" : "off"));
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      tip.hide();
      toggleFinder(false);
    }
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.matches("input:not([type=radio], [type=checkbox]), select, textarea")) return;
    const [, , act] = KEYS.find(([key]) => allowed.checked && key === event.key) ?? [];
    if (!act) return;
    event.preventDefault();
    act();
  });
}

// The first unit with something to tell: with many examples in several clusters, or with examples, or any.
function firstUnit({ summary: { examples, clusters } }) {
  const rich = examples.findIndex((count, unit) => count >= 20 && clusters[unit] > 1);
  return Math.max(0, rich >= 0 ? rich : examples.findIndex((count) => count > 0));
}

async function start() {
  document.querySelector("h1").textContent = index.title;
  document.body.append(tip.box);
  for (const prepare of [setUpSets, setUpFinder, setUpTools, setUpKeys]) prepare();
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
