// The list of units: sorted, filtered, searched, and drawn as an overview.

const ROWS = 50; // shown at first
const SORTS = [ // measure, what it is called, and whether the smallest (1) or the largest (-1) come first
  ["number", "number", 1],
  ["mean_distance", "polysemanticity", -1],
  ["clusters", "clusters", -1],
  ["frequency", "frequency", -1],
  ["examples", "examples", -1],
  ["maximum", "largest activation", -1],
];
const RANGES = [ // measure, its name, and how many times the unit that the reader writes is smaller
  ["mean_distance", "Polysemanticity", 1],
  ["frequency", "Frequency, %", 100],
  ["clusters", "Clusters", 1],
];

// The set that is listed, its units in order, and what a search found: Map unit -> { count, example }, or null.
const finder = { set: null, units: [], rows: ROWS, turn: 1, found: null, told: "", dots: new Map() };

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

const statusOf = ({ examples, frequency }, unit) => (examples[unit] ? "shown" : frequency[unit] ? "quiet" : "dead");

// The measure that the list shows; a list by number shows the polysemanticity.
const measureOf = (sort) => (sort === "number" ? "mean_distance" : sort);

function list() {
  const { summary, n } = set();
  const status = byId("status").value, sort = byId("sort").value;
  const bounds = RANGES.map(([name, , scale]) => {
    const bound = (end, none) => (byId(`${name}-${end}`).value === "" ? none : byId(`${name}-${end}`).value / scale);
    return { values: summary[name], low: bound("low", -Infinity), high: bound("high", Infinity) };
  }).filter(({ low, high }) => low > -Infinity || high < Infinity);
  const fits = (unit) =>
    (status === "all" || status === statusOf(summary, unit)) &&
    (finder.found === null || finder.found.has(unit)) &&
    bounds.every(({ values, low, high }) => values[unit] !== null && values[unit] >= low && values[unit] <= high);
  const inNumber = (unit) => -(finder.found?.get(unit).count ?? -unit); // found in texts: those with most of them first
  const value = sort === "number" ? inNumber : (unit) => summary[sort][unit];
  finder.units = Array.from({ length: n }, (_, unit) => unit).filter(fits).sort((a, b) => {
    const [one, other] = [value(a), value(b)];
    if (one === null || other === null) return (one === null) - (other === null) || a - b; // the undefined come last
    return (one - other) * finder.turn || a - b;
  });
  finder.rows = ROWS;
  const of = finder.units.length === n ? "" : ` of ${n.toLocaleString("en")}`;
  byId("count").textContent = `${finder.units.length.toLocaleString("en")}${of} ${nounOf(set())}s${finder.told}`;
  showRows();
}

function showRows() {
  byId("list").replaceChildren(...finder.units.slice(0, finder.rows).map(rowOf));
  byId("measure").textContent = SORTS.find(([name]) => name === measureOf(byId("sort").value))[1];
  const left = finder.units.length - finder.rows;
  byId("more").hidden = left <= 0;
  byId("more").textContent = `Show ${Math.min(left, 4 * ROWS)} more of ${left.toLocaleString("en")}`;
  markCurrent();
}

function rowOf(unit) {
  const { summary, keys } = set(), found = finder.found?.get(unit), status = statusOf(summary, unit);
  const measure = measureOf(byId("sort").value), value = summary[measure][unit];
  const bar = make("i", { "aria-hidden": "true" });
  if (status === "shown" && value !== null) {
    bar.style.setProperty("--share", shareBelow(set(), measure, value).toFixed(3));
  }
  const place = found?.example === undefined ? { unit } : { unit, example: found.example };
  const words = found?.count
    ? counted(found.count, "text")
    : (keys?.[unit] ?? []).map((id) => make("bdi", {}, wordOf(index.vocab[id])));
  return make("li", { "data-unit": unit }, panes[view.set].link(
    view.set, place, make("b", {}, String(unit)), span("words", words),
    bar, span("value", status === "shown" ? inWords(measure, value) : status),
  ));
}

// The row and the dot of the unit in view.
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
  const own = ++searches, query = byId("query").value;
  finder.told = "";
  finder.found = null;
  if (!plain(query)) return list();
  if (byId("search").elements.where.value === "text") {
    const found = await searchText(set(), query, (share) => {
      if (own === searches) byId("count").textContent = `Reading the texts: ${Math.round(100 * share)} %`;
    });
    if (own !== searches) return;
    finder.found = found;
    finder.told = ` with a text that holds ${quoted(query)}, most of them first`;
  } else {
    const { tokens, units } = searchTokens(set(), query);
    finder.found = new Map(units.map((unit) => [unit, {}]));
    const shown = tokens.slice(0, 3).map(visibleToken).join(", ");
    finder.told = units.length
      ? ` with the key token ${shown}${tokens.length > 3 ? ` and ${tokens.length - 3} more` : ""}`
      : ` with a key token that begins with ${quoted(query)}`;
  }
  list();
  say(byId("count").textContent);
}

// To the next unit of the list, or the one before.
function step(direction) {
  const units = finder.units, now = units.indexOf(view.places[view.set].unit);
  const next = now < 0 ? units[0] : units[now + direction];
  if (next !== undefined) visit(view.set, { unit: next });
}

function random() {
  const others = finder.units.filter((unit) => set().summary.examples[unit] && unit !== view.places[view.set].unit);
  if (others.length) visit(view.set, { unit: others[Math.floor(Math.random() * others.length)] });
}

const visited = []; // the last first

function noteVisit() {
  const number = view.set, { unit } = view.places[number];
  const old = visited.findIndex((each) => each.number === number && each.unit === unit);
  if (old >= 0) visited.splice(old, 1);
  visited.unshift({ number, unit });
  visited.splice(20);
  byId("visits").hidden = visited.length < 2;
  byId("visited").replaceChildren(...visited.map((each) => {
    const of = index.sets[each.number], label = `${nounOf(of)} ${each.unit}`;
    const link = panes[each.number].link(each.number, { unit: each.unit }, label);
    return make("li", {}, link, index.sets.length > 1 ? ` ${of.name}` : null);
  }));
}

function setUpFinder() {
  byId("by-number").addEventListener("submit", (event) => {
    event.preventDefault();
    visit(view.set, { unit: Number(byId("number").value) });
    byId("number").value = "";
  });
  byId("random").addEventListener("click", random);

  let pause;
  const soon = (milliseconds) => {
    clearTimeout(pause);
    pause = setTimeout(runSearch, milliseconds);
  };
  byId("search").addEventListener("input", () => soon(250));
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    soon(0);
  });

  const turn = (to) => {
    finder.turn = to;
    byId("turn").textContent = to > 0 ? "↑" : "↓";
    byId("turn").setAttribute("aria-label", `Order: ${to > 0 ? "smallest" : "largest"} first`);
    list();
  };
  byId("sort").append(...SORTS.map(([name, label]) => make("option", { value: name }, label)));
  byId("sort").addEventListener("change", ({ target }) => turn(SORTS.find(([name]) => name === target.value)[2]));
  byId("turn").addEventListener("click", () => turn(-finder.turn));
  byId("more").addEventListener("click", () => {
    finder.rows += 4 * ROWS;
    showRows();
  });

  const field = (name, label, end, placeholder) => make("input", {
    type: "number", step: "any", min: 0, id: `${name}-${end}`, placeholder, "aria-label": `${label} ${placeholder}`,
  });
  byId("ranges").append(...RANGES.map(([name, label]) => make(
    "fieldset", { class: "range" }, make("legend", { class: "label" }, label),
    field(name, label, "low", "from"), field(name, label, "high", "to"),
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
    const { clientX: left, clientY: y } = event;
    const told = `${inWords("mean_distance", distance[unit])}, active on ${percent(frequency[unit])}`;
    tip.showAt({ left, top: y - 6, bottom: y + 6, width: 0 }, `${nounOf(set())} ${unit}`, told);
  });
  overview.addEventListener("pointerleave", () => tip.hide());
  overview.addEventListener("click", (event) => {
    const unit = unitNear(event);
    if (unit !== null) visit(view.set, { unit });
  });
}
