// One unit on show: its clusters, texts, tree, map and measures.

const FIRST = 10; // windows of a cluster shown at first
const ABOUT = {
  mean_distance: ["Polysemanticity", "mean cosine distance between two of its examples; 0 if all are alike"],
  max_distance: ["Largest distance", "between the two examples least alike"],
  clusters: ["Clusters", "at this cut"],
  intra_distance: ["Within clusters", "mean distance of two examples of one cluster"],
  inter_distance: ["Across clusters", "mean distance of two examples of different clusters"],
  examples: ["Examples", "texts on which it comes near its largest activation; of many, the first that were met"],
  frequency: ["Frequency", "share of all tokens on which it is active"],
  maximum: ["Largest activation", "over all tokens that were read"],
  random_distance: ["Random inputs", "mean distance of any two tokens under its weights; compare polysemanticity with it"],
  participation: [
    "Participation", "how many input dimensions its weights use, in effect; with few, distances shrink by themselves",
  ],
};

class Pane {
  constructor(number, actions) {
    this.number = number;
    this.set = index.sets[number];
    this.actions = actions; // visit(set, place), adjust(set, place), say(text)
    this.root = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.root.querySelector(selector);
    this.root.id = `pane-${number}`;
    this.root.setAttribute("aria-label", this.set.name);
    this.find(".where").textContent = `${this.set.model} · ${this.set.name}`;
    this.find(".panel").id = `panel-${number}`;
    for (const radio of this.root.querySelectorAll(".options input")) radio.name = `colour-${number}`;

    this.tree = new Tree(this.find(".tree svg"), {
      name: "Height of the cut",
      cut: (height, done) => this.moveCut(height, done),
      pick: (cluster) => this.choose(cluster),
    });
    this.map = new ExampleMap(this.find(".map svg"), {
      point: (example, mark) => this.pointAt(example, mark),
      open: (example) => this.open(example),
    });
    this.find(".fewer").addEventListener("click", () => this.stepCut(-1));
    this.find(".finer").addEventListener("click", () => this.stepCut(1));
    this.find(".usual").addEventListener("click", () => this.moveCut(this.set.threshold, true));
    this.find(".usual").textContent = `cut at ${this.set.threshold}`;
    this.find(".options").addEventListener("change", () => this.showWindows());
    this.find(".panel > .more").addEventListener("click", () => this.showMore());
    this.find(".tabs").addEventListener("click", ({ target }) => {
      const tab = target.closest("[role=tab]");
      if (tab) this.choose(Number(tab.dataset.cluster));
    });
    this.find(".tabs").addEventListener("keydown", (event) => this.pressTab(event));
    tellTokens(this.find(".windows"), actions.say);
    const histogram = this.find(".histogram svg");
    histogram.addEventListener("pointerover", ({ target }) =>
      target.dataset.told ? tip.show(target, target.dataset.told) : tip.hide());
    histogram.addEventListener("pointerleave", () => tip.hide());
    new ResizeObserver(() => this.showDrawings()).observe(this.find(".structure"));
  }

  // Shows a place: { unit, cut, cluster } or { unit, cut, example }; resolves to the place as it is shown.
  async show(place) {
    const wanted = (this.wanted = Symbol("the last place asked for"));
    if (place.unit !== this.shown) {
      const [unit, texts] = await Promise.all([unitOf(this.set, place.unit), documents()]);
      if (this.wanted !== wanted) return null;
      this.load(place.unit, unit, texts);
    }
    if (!this.unit.examples.length) return { unit: place.unit };
    this.recut(place.cut ?? this.set.threshold);
    const marked = place.example in this.labels ? place.example : null;
    const cluster = marked === null ? place.cluster : this.labels[marked];
    this.select(cluster in this.clusters ? cluster : 0, marked);
    return this.place();
  }

  // What is said of the unit when it is shown.
  get told() { return this.find(".summary").textContent || this.find(".none").textContent; }

  place() { return { unit: this.shown, cut: this.cut, cluster: this.cluster }; }

  get summary() {
    return Object.fromEntries(Object.entries(this.set.summary).map(([name, values]) => [name, values[this.shown]]));
  }

  load(number, unit, texts) {
    Object.assign(this, { shown: number, unit, texts, cut: null, cluster: null, clusters: [] });
    const { maximum, frequency, examples, max_distance: largest } = this.summary;
    const noun = nounOf(this.set), name = `${noun[0].toUpperCase()}${noun.slice(1)} ${number}`;
    this.find("h2").textContent = name;
    this.find(".keys").replaceChildren(...(this.set.keys?.[number] ?? []).map((id) => chip(index.vocab[id])));
    const parted = this.unit.examples.length > 0;
    this.root.classList.toggle("empty", !parted);
    this.find(".none").hidden = parted;
    this.find(".none").textContent = frequency
      ? `No examples: active on ${percent(frequency)} of the tokens, but on no text as strongly as an example must be.`
      : `No examples: this ${noun} is dead, it was never active on the tokens that were read.`;
    const mixed = this.summary.mean_distance;
    const above = mixed === null ? "" : sharedBy(this.set, "mean_distance", mixed);
    const compared = mixed === null ? "" : `; polysemanticity ${rounded(mixed)}, above ${above}`;
    const active = `Active on ${percent(frequency)} of tokens, up to ${rounded(maximum)}.`;
    this.find(".summary").textContent = parted ? `${active} ${counted(examples, "example")}${compared}.` : "";
    this.keys = unit.examples.map(([document, position]) => index.vocab[texts[document][position]]);
    this.distances = distancesOf(unit, largest ?? 0);
    this.usual = cutTree(unit.tree, unit.examples.length, this.set.threshold);
    this.find(".options input[value=activation]").checked = true;
    this.find(".options input[value=importance]").disabled = !Object.keys(unit.importance ?? {}).length;
    this.showLogits();
    this.showRelatives();
  }

  // Cut ---------------------------------------------------------------------------------------------------------------

  recut(height) {
    if (height === this.cut) return;
    const count = this.unit.examples.length;
    this.cut = height;
    this.clusters = cutTree(this.unit.tree, count, height).map((members) => byTypicality(members, this.distances));
    this.labels = labelsOf(this.clusters, count);
    this.cluster = null;
    this.showTabs();
    this.showMeasures();
  }

  // The cluster in view stays the one that holds its central example.
  moveCut(height, done) {
    if (!this.clusters.length) return;
    if (height !== this.cut) {
      const central = this.clusters[this.cluster][0];
      this.recut(height);
      this.select(this.labels[central]);
    }
    if (!done) return;
    this.actions.adjust(this.number, this.place());
    this.actions.say(`Cut at ${this.cut}: ${counted(this.clusters.length, "cluster")}`);
  }

  // To the next height at which the number of clusters changes: finer (1) or coarser (-1).
  stepCut(direction) {
    const heights = this.unit.tree.map(([, , merged]) => merged);
    const { step } = this.tree;
    const below = heights.findLast((merged) => merged <= this.cut), above = heights.find((merged) => merged > this.cut);
    const target = direction > 0 ? below : above;
    if (target === undefined) return;
    const upTo = Math.ceil(target / step - 1e-9) * step; // the first round height at which the merge is made
    this.moveCut(Math.max(0, Number((direction > 0 ? upTo - step : upTo).toFixed(6))), true);
  }

  // Clusters ----------------------------------------------------------------------------------------------------------

  showTabs() {
    const tabs = this.clusters.map((members, cluster) => {
      const mostly = commonest(members.map((example) => this.keys[example]));
      return make(
        "button",
        {
          type: "button", role: "tab", id: `tab-${this.number}-${cluster}`, "data-cluster": cluster, tabindex: -1,
          "aria-controls": `panel-${this.number}`, "aria-selected": "false",
          "aria-label": `Cluster ${cluster}: ${counted(members.length, "example")}, mostly ${quoted(mostly)}`,
        },
        sign(cluster), make("bdi", {}, wordOf(mostly)), make("small", {}, String(members.length)),
      );
    });
    this.find(".tabs").replaceChildren(...tabs);
    this.find(".clusters").textContent = counted(this.clusters.length, "cluster");
    this.find(".fewer").disabled = this.clusters.length === 1;
    this.find(".finer").disabled = this.clusters.length === this.unit.examples.length;
    this.find(".usual").hidden = this.cut === this.set.threshold;
  }

  pressTab(event) {
    const last = this.clusters.length - 1;
    const to = {
      ArrowLeft: this.cluster ? this.cluster - 1 : last, ArrowRight: this.cluster < last ? this.cluster + 1 : 0,
      Home: 0, End: last,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(to);
    this.find("[role=tab][aria-selected=true]").focus();
  }

  choose(cluster) {
    if (!(cluster in this.clusters)) return;
    this.select(cluster);
    this.actions.adjust(this.number, this.place());
  }

  select(cluster, marked = null) {
    if (cluster === this.cluster && marked === null) return this.showDrawings();
    this.cluster = cluster;
    this.marked = marked;
    for (const tab of this.find(".tabs").children) {
      const chosen = Number(tab.dataset.cluster) === cluster;
      tab.setAttribute("aria-selected", chosen);
      tab.tabIndex = chosen ? 0 : -1;
      if (chosen) keepInView(tab);
    }
    this.find(".panel").setAttribute("aria-labelledby", `tab-${this.number}-${cluster}`);
    this.showDrawings();
    this.showWindows();
    this.showSimilar();
  }

  // An example that is asked for comes to the top of its cluster.
  open(example) {
    this.select(this.labels[example], example);
    this.actions.adjust(this.number, this.place());
    const text = this.find(`[data-example="${example}"] .text`);
    text.focus({ preventScroll: true });
    text.scrollIntoView({ block: "nearest" });
  }

  pointAt(example, mark) {
    if (example === null) return tip.hide();
    const words = this.around(example, 5, 2), cluster = this.labels[example];
    tip.show(mark, `cluster ${cluster}`, words);
    this.actions.say(`Cluster ${cluster}: ${words}`);
  }

  // Some tokens around an example's key token.
  around(example, back, ahead) {
    const [document, position] = this.unit.examples[example];
    return wordsAround(this.texts[document], position, back, ahead);
  }

  // Drawings ----------------------------------------------------------------------------------------------------------

  showDrawings() {
    if (!this.clusters?.length || this.cluster === null) return;
    const { unit, cut, clusters, labels, cluster: selected } = this;
    this.tree.show({ tree: unit.tree, order: unit.order, cut, usual: this.set.threshold, clusters, labels, selected });
    this.map.show({ places: unit.map, labels, selected, central: clusters[selected][0] });
    const share = this.set.at_least ?? 0.75;
    if (unit.histogram) drawHistogram(this.find(".histogram svg"), unit.histogram, share * this.summary.maximum);
    this.find(".histogram").hidden = !unit.histogram;
    this.find(".histogram .caption").textContent =
      `Tokens by activation, on a logarithmic scale. Examples come from the dark bars: ${percent(share)} of the largest or more.`;
  }

  // Windows -----------------------------------------------------------------------------------------------------------

  showWindows() {
    if (!this.clusters.length) return;
    const importance = this.find(".options input:checked").value === "importance";
    const members = [...this.clusters[this.cluster]], [central] = members;
    const known = (example) => importance && example in this.unit.importance;
    const rank = (example) => [example === this.marked, known(example), true].indexOf(true);
    members.sort((a, b) => rank(a) - rank(b));
    this.find(".explained").textContent = importance
      ? "Change of the activation at the underlined token when a token is replaced by padding; 1: as much as by its own."
      : "Each text has its strongest token underlined; the most typical text comes first, the least typical last.";
    this.find(".largest").textContent = importance ? "1" : rounded(this.summary.maximum);
    this.find(".scale").classList.toggle("importance", importance);
    this.waiting = members.map((example) => () => this.windowOf(example, importance, example === central));
    this.find(".windows").replaceChildren();
    this.find(".windows").classList.toggle("importance", importance);
    this.showMore();
  }

  showMore() {
    const list = this.find(".windows"), from = list.children.length;
    list.append(...this.waiting.splice(0, FIRST).map((window) => window()));
    const left = this.waiting.length, button = this.find(".panel > .more");
    button.hidden = !left;
    button.textContent = left > FIRST ? `Show ${FIRST} more of ${left}` : `Show ${left} more`;
    const next = list.children[from]?.querySelector(".text");
    if (from === 0 && next) next.tabIndex = 0;
    else next?.focus({ preventScroll: true });
  }

  windowOf(example, importance, central) {
    const place = this.unit.examples[example], [document, position, value] = place, start = startOf(place);
    const bytes = this.unit.windows[example], known = this.unit.importance?.[example];
    const ids = this.texts[document].slice(start, start + bytes.length);
    const words = ids.map((id) => index.vocab[id]), key = position - start;
    const shares = ids.map((_, i) => (importance ? known?.[i] ?? 0 : bytes[i]) / 255);
    const told = shares.map((share, i) => {
      if (!importance) return `activation ${rounded(share * this.summary.maximum)}`;
      if (!known) return "importance not computed for this text";
      return i > key ? "comes later: no importance" : `importance ${rounded(share)}`;
    });
    const named = `${visible(words.join(""))}. Key token ${quoted(words[key])}, activation ${rounded(value)}`;
    const text = make(
      "p",
      {
        class: "text", dir: "auto", tabindex: -1, role: "group", "aria-roledescription": "text",
        "aria-label": central ? `Central example. ${named}` : named,
      },
      tokenSpans(words, shares, told, key),
    );
    const notes = [
      central ? make("strong", {}, "central example") : null,
      example === this.marked ? make("strong", {}, "the one you asked for") : null,
      importance && !known ? "importance not computed" : null,
      `text ${document}, token ${position}`,
    ];
    const rest = [this.texts[document].slice(0, start), this.texts[document].slice(start + ids.length)];
    const cut = [rest[0].length ? "before" : "", rest[1].length ? "after" : ""].join(" ").trim();
    const whole = make("button", { type: "button", class: "quiet", click: () => {
      item.classList.remove("before", "after");
      text.prepend(restOf(rest[0]));
      text.append(restOf(rest[1]));
      whole.remove();
      text.focus({ preventScroll: true });
    } }, "whole text");
    const note = make(
      "p", { class: "note" },
      notes.map((each) => each && make("span", {}, each)), cut ? whole : null, make("b", {}, rounded(value)),
    );
    const item = make("li", { "data-example": example, class: `${central ? "central " : ""}${cut}` }, text, note);
    return item;
  }

  // Measures ----------------------------------------------------------------------------------------------------------

  showMeasures() {
    const own = { ...this.summary, clusters: this.clusters.length, ...meanDistances(this.distances, this.labels) };
    const ofCut = ["clusters", "intra_distance", "inter_distance"];
    const names = [...Object.keys(ABOUT), ...Object.keys(own).filter((name) => !(name in ABOUT))];
    const rows = names.filter((name) => name in own).map((name) => {
      const [usual, meaning] = ABOUT[name] ?? [name.replaceAll("_", " "), ""];
      const title = name === "frequency" && this.set.kind === "latents" ? "Density" : usual;
      const value = own[name], asked = ofCut.includes(name) && this.cut !== this.set.threshold;
      const track = make("span", { class: "track", "aria-hidden": "true" }, make("i"));
      const compared = value !== null && !asked; // with the other units, whose clusters are those of the usual cut
      if (compared) track.firstChild.style.insetInlineStart = `${100 * shareBelow(this.set, name, value)}%`;
      const place = asked ? `at the cut of ${this.cut}` : `above ${sharedBy(this.set, name, value)}`;
      const told = value === null ? "undefined here" : place;
      return make(
        "div", {},
        make("dt", {}, title),
        make(
          "dd", { "data-name": name, "data-value": value ?? "" },
          make("b", {}, inWords(name, value)), compared ? track : null, make("small", {}, told),
        ),
        make("dd", { class: "meaning" }, meaning),
      );
    });
    this.find(".metrics dl").replaceChildren(...rows);
  }

  showLogits() {
    const { promotes = [], suppresses = [] } = this.unit;
    const most = Math.max(1e-9, ...[...promotes, ...suppresses].map(([, logit]) => Math.abs(logit)));
    const rows = (pairs) => pairs.map(([id, logit]) => {
      const bar = make("i", { "aria-hidden": "true" });
      bar.style.setProperty("--share", (Math.abs(logit) / most).toFixed(3));
      return make("li", {}, chip(index.vocab[id]), bar, span("value", rounded(logit)));
    });
    this.find(".promotes").replaceChildren(...rows(promotes));
    this.find(".suppresses").replaceChildren(...rows(suppresses));
    this.find(".logits").hidden = !promotes.length && !suppresses.length;
  }

  // Others ------------------------------------------------------------------------------------------------------------

  // A link to a unit, perhaps at an example; a plain click stays in the page and in its history.
  link(set, place, ...children) {
    const follow = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
      event.preventDefault();
      this.actions.visit(set, place);
    };
    return make("a", { href: addressOf(set, place), click: follow }, ...children);
  }

  // Similar clusters are known for the usual cut: those of the cluster that this one's central example is in there.
  showSimilar() {
    const central = this.clusters[this.cluster][0];
    const usual = this.usual.findIndex((members) => members.includes(central));
    const similar = this.unit.similar?.[usual] ?? [];
    const list = this.find(".similar ol"), here = this.unit;
    const several = this.clusters.length > 1;
    const foundAt = this.cut === this.set.threshold ? "" : `, at the cut of ${this.set.threshold}`;
    this.find(".similar h3").textContent = several ? `Similar to cluster ${this.cluster}` : "Similar clusters";
    this.find(".similar .caption").textContent = similar.length
      ? `Clusters of other units whose central texts come from near inputs${foundAt}.`
      : "None is known.";
    list.replaceChildren(...similar.map(([set, unit, example, similarity]) => {
      const other = index.sets[set], text = make("p", { class: "text small", dir: "auto" }, "…");
      const name = `${nounOf(other)} ${unit}${set === this.number ? "" : `, ${other.name}`}`;
      this.quote(other, unit, example, text, () => this.unit === here);
      return make("li", {}, this.link(set, { unit, example }, name), span("value", rounded(similarity)), text);
    }));
  }

  // The central text of another unit's cluster, as soon as its part is unpacked.
  async quote(set, number, example, text, current) {
    const [unit, texts] = await Promise.all([unitOf(set, number), documents()]);
    const place = unit.examples[example];
    if (!current() || !place) return;
    const [document, position] = place, start = Math.max(0, position - 10), shift = start - startOf(place);
    const bytes = unit.windows[example].slice(shift, shift + position - start + 6);
    const words = texts[document].slice(start, start + bytes.length).map((id) => index.vocab[id]);
    text.replaceChildren(...tokenSpans(words, bytes.map((byte) => byte / 255), [], position - start));
  }

  showRelatives() {
    const neighbours = this.unit.decoder_neighbours ?? [], absorption = this.unit.absorption ?? [];
    this.find(".neighbours").hidden = !neighbours.length;
    this.find(".neighbours ol").replaceChildren(...neighbours.map(([unit, cosine]) => make(
      "li", {}, this.link(this.number, { unit }, `latent ${unit}`),
      span("keys", (this.set.keys?.[unit] ?? []).slice(0, 2).map((id) => chip(index.vocab[id]))),
      span("value", rounded(cosine)),
    )));
    this.find(".absorption").hidden = this.set.kind !== "latents";
    this.find(".absorption ul").replaceChildren(...(absorption.length
      ? absorption.map(([letter, main, share]) => make(
        "li", {}, "It stands in for ", this.link(this.number, { unit: main }, `latent ${main}`),
        `, the latent of first letter ${quoted(letter)}, on ${percent(share)} of the words with it.`,
      ))
      : [make("li", {}, "Not flagged: it was not seen to stand in for the latent of a first letter.")]));
  }
}

const sharedBy = (set, name, value) => `${Math.round(100 * shareBelow(set, name, value))} % of the ${nounOf(set)}s`;

// Tokens outside a window: their activations are not kept.
const restOf = (ids) => make("em", { class: "rest" }, visible(ids.map((id) => index.vocab[id]).join("")));

// A token by itself; spaces at its beginning are marked faintly.
function chip(text) {
  const shown = visibleToken(text), spaces = /^␣*/.exec(shown)[0];
  return make("bdi", { class: "chip" }, spaces ? make("span", {}, spaces) : null, shown.slice(spaces.length));
}

function commonest(words) {
  const counts = new Map();
  for (const word of words) counts.set(word, (counts.get(word) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0][0];
}

function wordsAround(ids, position, back, ahead) {
  const words = ids.slice(Math.max(0, position - back), position + ahead + 1).map((id) => index.vocab[id]);
  return visible(words.join("")).trim();
}

// Scrolls a strip, and nothing else, until the element is seen.
function keepInView(element) {
  const strip = element.parentElement, top = element.offsetTop - strip.offsetTop;
  if (top < strip.scrollTop) strip.scrollTop = top;
  const below = top + element.offsetHeight - strip.clientHeight;
  if (below > strip.scrollTop) strip.scrollTop = below;
}
