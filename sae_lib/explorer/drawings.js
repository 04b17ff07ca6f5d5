// Drawings: the tree with its cut, the map, the histogram, and windows of tokens. They show what they are given and
// say what the reader does with them; they hold no state of their own but the token that is pointed at.

const SVG = "http://www.w3.org/2000/svg";

// An element; functions among its attributes listen. Strings become text, never markup.
function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const span = (name, ...children) => make("span", { class: name }, ...children);

// A cluster's sign: a colour and a shape, so that it can be told without its colour. ----------------------------------

const SHAPES = [
  "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0Z",
  "M-.9-.9H.9V.9H-.9Z",
  "M0-1.15L1.1.85H-1.1Z",
  "M0-1.25L1.1 0L0 1.25L-1.1 0Z",
  "M0 1.15L1.1-.85H-1.1Z",
  "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
  "M-.62-1.1H.62L1.2 0L.62 1.1H-.62L-1.2 0Z",
  "M0-.57L.57-1.14L1.14-.57L.57 0L1.14 .57L.57 1.14L0 .57L-.57 1.14L-1.14 .57L-.57 0L-1.14-.57L-.57-1.14Z",
];
const COLOURS = 7;
const signOf = (cluster) => ({ class: `sign colour-${cluster % COLOURS}`, d: SHAPES[cluster % SHAPES.length] });

const sign = (cluster) =>
  draw("svg", { class: "inline-sign", viewBox: "-1.5 -1.5 3 3", "aria-hidden": "true" }, draw("path", signOf(cluster)));

// The one small note that follows what is pointed at. -----------------------------------------------------------------

const tip = {
  box: make("div", { class: "tip", role: "presentation", hidden: true }),
  show(target, ...lines) { this.showAt(target.getClientRects()[0] ?? target.getBoundingClientRect(), ...lines); },
  showAt({ left, top, bottom, width }, ...lines) {
    this.box.replaceChildren(...lines.map((line) => make("span", {}, line)));
    this.box.hidden = false;
    const own = this.box.getBoundingClientRect(), above = top - own.height - 6;
    this.box.style.left = `${Math.min(Math.max(4, left + width / 2 - own.width / 2), innerWidth - own.width - 4)}px`;
    this.box.style.top = `${above > 0 ? above : bottom + 6}px`;
  },
  hide() { this.box.hidden = true; },
};

// Tree ----------------------------------------------------------------------------------------------------------------

// The dendrogram: leaves at the bottom, distances upwards, and a line that cuts it and can be moved.
class Tree {
  constructor(svg, { cut, pick, name }) {
    this.svg = svg;
    this.moved = cut; // called with the height, and whether the reader is done moving
    this.axis = draw("g", { class: "axis", "aria-hidden": "true" });
    this.areas = draw("g", { class: "areas", "aria-hidden": "true" });
    this.branches = draw("g", { class: "branches", "aria-hidden": "true" });
    this.line = draw("line", {});
    this.label = draw("text", { "text-anchor": "middle", dy: "0.35em" });
    this.grip = draw("rect", { class: "grip", rx: 11, height: 22, width: 52, y: -11 });
    this.reach = draw("rect", { class: "reach", height: 32, y: -16 });
    this.handle = draw(
      "g", { class: "cut", role: "slider", tabindex: 0, "aria-label": name, "aria-orientation": "vertical" },
      this.reach, this.line, this.grip, this.label,
    );
    svg.replaceChildren(this.axis, this.areas, this.branches, this.handle);
    this.areas.addEventListener("click", ({ target }) => pick(Number(target.dataset.cluster)));
    this.handle.addEventListener("keydown", (event) => this.press(event));
    this.handle.addEventListener("pointerdown", (event) => this.grab(event));
    // a finger on the handle moves the cut, not the page; touch-action has no effect on parts of a drawing
    this.handle.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  }

  // The line follows the pointer until it is let go.
  grab(event) {
    event.preventDefault();
    this.handle.focus({ preventScroll: true });
    this.handle.setPointerCapture(event.pointerId);
    const follow = ({ clientY }) => this.moved(this.heightAt(clientY - this.svg.getBoundingClientRect().top), false);
    const drop = () => {
      this.handle.removeEventListener("pointermove", follow);
      this.moved(this.cutAt, true);
    };
    this.handle.addEventListener("pointermove", follow);
    this.handle.addEventListener("lostpointercapture", drop, { once: true });
  }

  press(event) {
    const { step, top, cutAt } = this;
    const to = {
      ArrowUp: cutAt + step, ArrowRight: cutAt + step, ArrowDown: cutAt - step, ArrowLeft: cutAt - step,
      PageUp: cutAt + 10 * step, PageDown: cutAt - 10 * step, Home: 0, End: top,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.moved(this.rounded(to), true);
  }

  rounded(height) {
    const clipped = Math.min(this.top, Math.max(0, height));
    return Number((Math.round(clipped / this.step) * this.step).toFixed(6));
  }

  heightAt(y) { return this.rounded((1 - (y - this.above) / this.tall) * this.top); }

  yOf(height) { return this.above + (1 - height / this.top) * this.tall; }

  // Distances of a unit fill the drawing; the cut moves in about a hundred round steps.
  show({ tree, order, cut, usual, clusters, labels, selected }) {
    const width = this.svg.clientWidth || 300, height = this.svg.clientHeight || 160;
    const left = 34, right = 60;
    const wide = Math.max(50, width - left - right);
    Object.assign(this, { above: 12, tall: height - 12 - 18 });
    const highest = Math.max(tree.at(-1)?.[2] ?? 0, usual) * 1.04;
    this.step = 10 ** Math.ceil(Math.log10(highest / 150));
    this.top = Number((Math.ceil(highest / this.step) * this.step).toFixed(6));
    this.cutAt = cut;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const line = this.yOf(Math.min(cut, this.top));

    const gap = wide / order.length;
    const leaves = [];
    order.forEach((leaf, i) => { leaves[leaf] = { x: left + (i + 0.5) * gap, height: 0, cluster: labels[leaf] }; });
    const nodes = [...leaves];
    const branches = tree.map(([a, b, merged]) => {
      const one = nodes[a], other = nodes[b];
      const cluster = merged <= cut ? one.cluster : null;
      nodes.push({ x: (one.x + other.x) / 2, height: merged, cluster });
      const path = `M${one.x} ${this.yOf(one.height)}V${this.yOf(merged)}H${other.x}V${this.yOf(other.height)}`;
      const look = cluster === null ? "above" : `colour-${cluster % COLOURS}${cluster === selected ? " selected" : ""}`;
      return draw("path", { d: path, class: look });
    });
    this.branches.replaceChildren(...branches);

    const floor = this.yOf(0), areas = [];
    clusters.forEach((members, cluster) => {
      const places = members.map((leaf) => leaves[leaf].x);
      const from = Math.min(...places) - gap / 2, across = Math.max(...places) - from + gap / 2;
      const attributes = { "data-cluster": cluster, x: from, width: across };
      const chosen = cluster === selected ? " selected" : "";
      areas.push(draw("rect", { ...attributes, class: `area${chosen}`, y: line, height: floor - line + 14 }));
      areas.push(draw("rect", {
        ...attributes, class: `foot colour-${cluster % COLOURS}${chosen}`, y: floor + 5, height: 6,
        x: from + Math.min(0.6, gap / 6), width: Math.max(1, across - Math.min(1.2, gap / 3)),
      }));
    });
    this.areas.replaceChildren(...areas);

    const tick = [1, 2, 5, 10, 20, 50].map((each) => each * this.step).find((each) => this.top / each <= 5) ?? this.top;
    const ticks = [];
    for (let at = 0; at <= this.top + 1e-9; at += tick) ticks.push(Number(at.toFixed(6)));
    this.axis.replaceChildren(...ticks.flatMap((at) => [
      draw("line", { x1: left, x2: left + wide, y1: this.yOf(at), y2: this.yOf(at) }),
      draw("text", { x: left - 6, y: this.yOf(at), dy: "0.35em", "text-anchor": "end" }, String(at)),
    ]));

    this.handle.setAttribute("transform", `translate(0 ${line})`);
    filled(this.reach, { x: left, width: wide + right }, []);
    filled(this.line, { x1: left, x2: left + wide + 4 }, []);
    this.grip.setAttribute("x", left + wide + 4);
    this.label.setAttribute("x", left + wide + 30);
    this.label.textContent = `↕ ${cut}`;
    filled(this.handle, {
      "aria-valuemin": 0, "aria-valuemax": Math.max(cut, this.top), "aria-valuenow": cut,
      "aria-valuetext": `${cut}: ${counted(clusters.length, "cluster")}`,
    }, []);
  }
}

// Map -----------------------------------------------------------------------------------------------------------------

// The examples as points: near ones have near embeddings. Arrow keys walk to the nearest point in a direction.
class ExampleMap {
  constructor(svg, { point, open }) {
    this.svg = svg;
    this.point = point; // called with an example that is pointed at and its mark, or null
    this.svg.addEventListener("pointerover", ({ target }) => this.aim(target.dataset.example ?? null));
    this.svg.addEventListener("pointerleave", () => this.aim(null));
    this.svg.addEventListener("click", ({ target }) => target.dataset.example && open(Number(target.dataset.example)));
    this.svg.addEventListener("focus", () => {
      if (this.svg.matches(":focus-visible")) this.aim(this.aimed ?? this.central);
    });
    this.svg.addEventListener("blur", () => this.aim(null));
    this.svg.addEventListener("keydown", (event) => {
      const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (direction) this.walk(direction);
      else if (["Enter", " "].includes(event.key) && this.aimed !== null) open(this.aimed);
      else return;
      event.preventDefault();
    });
  }

  show({ places, labels, selected, central }) {
    const side = this.svg.clientWidth || 200, edge = 14;
    this.svg.setAttribute("viewBox", `0 0 ${side} ${side}`);
    Object.assign(this, { central, aimed: null });
    this.places = places.map(([x, y]) => [edge + x * (side - 2 * edge), edge + (1 - y) * (side - 2 * edge)]);
    const marks = this.places.map(([x, y], example) => {
      const { class: look, d } = signOf(labels[example]);
      const chosen = labels[example] === selected, size = example === central ? 7 : chosen ? 5 : 4;
      const classes = `${look}${chosen ? " selected" : ""}${example === central ? " central" : ""}`;
      const data = { "data-example": example, "data-cluster": labels[example] };
      return draw("path", { class: classes, d, ...data, transform: `translate(${x} ${y}) scale(${size})` });
    });
    this.marks = marks;
    const last = (mark) => mark.classList.contains("selected") + mark.classList.contains("central");
    this.svg.replaceChildren(...[...marks].sort((a, b) => last(a) - last(b)));
  }

  aim(example) {
    this.marks?.forEach((mark) => mark.classList.remove("here"));
    this.aimed = example === null ? null : Number(example);
    const mark = this.aimed === null ? null : this.marks[this.aimed];
    mark?.classList.add("here");
    this.point(this.aimed, mark);
  }

  walk([right, down]) {
    const from = this.places[this.aimed ?? this.central];
    let best = null, least = Infinity;
    this.places.forEach(([x, y], example) => {
      const along = (x - from[0]) * right + (y - from[1]) * down;
      const aside = Math.abs((x - from[0]) * down) + Math.abs((y - from[1]) * right);
      const far = along + 2 * aside;
      if (along > 0.5 && far < least) [best, least] = [example, far];
    });
    if (best !== null) this.aim(best);
  }
}

// Histogram -----------------------------------------------------------------------------------------------------------

// Activations above zero, one bar an interval, heights on a logarithmic scale. Examples come from the marked bars.
function drawHistogram(svg, { edges, counts }, from) {
  const width = svg.clientWidth || 260, height = svg.clientHeight || 110, floor = height - 18;
  const most = Math.log1p(Math.max(1, ...counts));
  const x = (value) => ((value - edges[0]) / (edges.at(-1) - edges[0] || 1)) * (width - 2) + 1;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const bars = counts.map((count, i) => {
    const tall = (Math.log1p(count) / most) * (floor - 4), within = edges[i + 1] > from;
    const told = `${rounded(edges[i])} to ${rounded(edges[i + 1])}: ${counted(count, "token")}`;
    const place = { x: x(edges[i]) + 0.5, width: Math.max(0.5, x(edges[i + 1]) - x(edges[i]) - 1) };
    return [
      draw("rect", { ...place, class: within ? "column within" : "column", y: floor - tall, height: tall }),
      draw("rect", { ...place, class: "reach", y: 0, height: floor, "data-told": told }),
    ];
  });
  svg.replaceChildren(
    ...bars.flat(),
    draw("line", { class: "floor", x1: 0, x2: width, y1: floor, y2: floor }),
    draw("text", { x: 0, y: height - 4 }, rounded(edges[0])),
    draw("text", { x: width, y: height - 4, "text-anchor": "end" }, rounded(edges.at(-1))),
  );
  const total = counts.reduce((sum, count) => sum + count, 0);
  svg.setAttribute("aria-label", `Activations of ${counted(total, "token")}, from 0 up to ${rounded(edges.at(-1))}`);
}

// All units -----------------------------------------------------------------------------------------------------------

// Each unit a dot: how often it is active, on a logarithmic scale, and how far its examples are apart. Those of the
// list are dark, the one in view has a ring. Gives the dots' places back.
function drawOverview(svg, { frequency, mean_distance: distance }, listed, current) {
  const width = svg.clientWidth || 230, height = svg.clientHeight || 110, edge = 6;
  const known = distance.map((_, unit) => unit).filter((unit) => distance[unit] !== null && frequency[unit] > 0);
  const logs = known.map((unit) => Math.log10(frequency[unit]));
  const low = Math.min(...logs), wide = Math.max(...logs) - low || 1;
  const most = Math.max(1e-9, ...known.map((unit) => distance[unit]));
  const dots = new Map(known.map((unit, i) => [unit, [
    edge + ((logs[i] - low) / wide) * (width - 2 * edge), height - edge - (distance[unit] / most) * (height - 2 * edge),
  ]]));
  const path = (units) => units.map((unit) => (dots.has(unit) ? `M${dots.get(unit).join(" ")}h0` : "")).join("");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const [x, y] = dots.get(current) ?? [-99, -99];
  svg.replaceChildren(
    draw("path", { class: "others", d: path(known) }),
    draw("path", { class: "listed", d: path(listed) }),
    draw("circle", { cx: x, cy: y, r: 5 }),
  );
  return dots;
}

// Windows of tokens ---------------------------------------------------------------------------------------------------

// A window's tokens, each with its strength in [0, 1] for the colour and what is told of it.
function tokenSpans(words, strengths, told, key) {
  return words.flatMap((word, i) => {
    const look = [strengths[i] > 0 ? "on" : "", i === key ? "key" : i > key ? "later" : ""].join(" ").trim();
    const space = word.startsWith(" ") && word.trim() ? " " : ""; // a space before a word has no colour
    const shown = word.slice(space.length);
    const span = make("span", { class: look || false, "data-told": told[i] }, visible(shown));
    span.dataset.token = visibleToken(word);
    if (strengths[i] > 0) span.style.setProperty("--strength", strengths[i].toFixed(3));
    return i === 0 ? [span] : [space, span];
  });
}

// Tells the value of the token that is pointed at, tapped, or walked to with the left and right arrow keys.
function tellTokens(list, say) {
  const clear = () => {
    list.querySelectorAll(".here").forEach((each) => each.classList.remove("here"));
    tip.hide();
  };
  const tell = (span) => {
    clear();
    span.classList.add("here");
    tip.show(span, span.dataset.token, span.dataset.told);
  };
  const under = ({ target }) => target.closest("[data-told]");
  list.addEventListener("pointerover", (event) => under(event) ? tell(under(event)) : clear());
  list.addEventListener("pointerleave", clear);
  list.addEventListener("click", (event) => {
    const span = under(event);
    if (!span) return;
    span.closest("[tabindex]").focus({ preventScroll: true });
    tell(span);
    say(`${span.dataset.token}: ${span.dataset.told}`);
  });
  list.addEventListener("focusout", clear);
  list.addEventListener("keydown", (event) => {
    const text = event.target.closest(".text");
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!text) return;
    if (step) {
      const spans = [...text.querySelectorAll("[data-told]")];
      const placeOf = (name) => spans.findIndex((each) => each.classList.contains(name));
      const next = placeOf("here") < 0 ? placeOf("key") : placeOf("here") + step;
      if (!spans[next]) return event.preventDefault();
      tell(spans[next]);
      say(`${spans[next].dataset.token}: ${spans[next].dataset.told}`);
    } else if (["ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) {
      const texts = [...list.querySelectorAll(".text")], at = texts.indexOf(text);
      const to = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: texts.length - 1 }[event.key];
      if (texts[to]) {
        text.tabIndex = -1;
        texts[to].tabIndex = 0;
        texts[to].focus();
      }
    } else return;
    event.preventDefault();
  });
}
