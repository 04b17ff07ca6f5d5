"use strict";
// What the page holds, and the arithmetic of clusters. Nothing here touches what is shown.

const index = JSON.parse(document.getElementById("explorer-index").textContent);
const PART_UNITS = 32; // consecutive units of a set that share a part
const BACK = 20, AHEAD = 10; // tokens of a window before and after its key token
const KEPT = 32; // parts that stay unpacked

const parts = new Map(); // id -> promise of the part's content, least recently used first

function part(id) {
  const content = parts.get(id) ?? unpack(id);
  parts.delete(id);
  parts.set(id, content);
  if (parts.size > KEPT) parts.delete([...parts.keys()].find((each) => each !== index.documents));
  return content;
}

// Base64 of gzip of JSON.
async function unpack(id) {
  const text = atob(document.getElementById(id).textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const documents = async () => (await part(index.documents)).tokens;

async function unitOf(set, number) {
  const units = await part(set.parts[Math.floor(number / PART_UNITS)]);
  return units[number % PART_UNITS];
}

// Where a window begins in its document.
const startOf = ([, position]) => Math.max(0, position - BACK);

const nounOf = (set) => (set.kind === "latents" ? "latent" : "neuron");

// Clusters ------------------------------------------------------------------------------------------------------------

// Cosine distances between a unit's examples, as a full matrix; they are stored in 255ths of the largest.
function distancesOf(unit, largest) {
  const bytes = atob(unit.closeness), count = unit.examples.length;
  const distances = Array.from({ length: count }, () => new Float64Array(count));
  let k = 0;
  for (let i = 0; i < count; i++) {
    for (let j = i + 1; j < count; j++) {
      distances[i][j] = distances[j][i] = (bytes.charCodeAt(k++) / 255) * largest;
    }
  }
  return distances;
}

// Cluster of each example when the tree is cut: merges at or below the height stay. Clusters are numbered by size,
// largest first; of equal ones the one that was met first comes first.
function cutTree(tree, count, height) {
  const parent = Array.from({ length: count + tree.length }, (_, node) => node);
  const rootOf = (node) => {
    while (parent[node] !== node) node = parent[node];
    return node;
  };
  tree.forEach(([a, b, merged], i) => {
    if (merged <= height) parent[a] = parent[b] = count + i;
  });
  const members = new Map();
  for (let example = 0; example < count; example++) {
    const root = rootOf(example);
    if (!members.has(root)) members.set(root, []);
    members.get(root).push(example);
  }
  return [...members.values()].sort((a, b) => b.length - a.length || a[0] - b[0]);
}

function labelsOf(clusters, count) {
  const labels = new Array(count).fill(0);
  clusters.forEach((members, cluster) => members.forEach((example) => { labels[example] = cluster; }));
  return labels;
}

// Members of a cluster from the most typical (highest mean similarity to the others) to the least.
function byTypicality(members, distances) {
  const far = (example) => members.reduce((sum, other) => sum + distances[example][other], 0);
  const sums = new Map(members.map((example) => [example, far(example)]));
  return [...members].sort((a, b) => sums.get(a) - sums.get(b) || a - b);
}

// The two of the paper's proxies that depend on the cut: mean distance of pairs within a cluster, pooled over the
// clusters, and of pairs across clusters; null where there is no such pair.
function meanDistances(distances, labels) {
  const sum = [0, 0], pairs = [0, 0];
  for (let i = 0; i < labels.length; i++) {
    for (let j = i + 1; j < labels.length; j++) {
      const across = labels[i] === labels[j] ? 0 : 1;
      sum[across] += distances[i][j];
      pairs[across] += 1;
    }
  }
  const mean = (across) => (pairs[across] ? sum[across] / pairs[across] : null);
  return { intra_distance: mean(0), inter_distance: mean(1) };
}

// Share of the set's units, among those with a value, whose value is smaller.
function shareBelow(set, name, value) {
  const known = set.summary[name].filter((each) => each !== null);
  return known.filter((each) => each < value).length / Math.max(1, known.length);
}

// Search --------------------------------------------------------------------------------------------------------------

const plain = (text) => text.trim().toLowerCase();

// Units whose examples have a key token of that text; without any, whose key token begins with it.
function searchTokens(set, query) {
  const wanted = plain(query);
  const known = Object.keys(set.words).filter((id) => plain(index.vocab[id]).startsWith(wanted));
  const equal = known.filter((id) => plain(index.vocab[id]) === wanted);
  const ids = equal.length ? equal : known;
  const units = new Set(ids.flatMap((id) => set.words[id]));
  return { tokens: ids.map((id) => index.vocab[id]), units: [...units] };
}

const placesOf = new Map(); // set -> each unit's examples as [document, position], kept once a text was searched

async function allPlaces(set, report) {
  if (placesOf.has(set)) return placesOf.get(set);
  const places = [];
  for (const [i, id] of set.parts.entries()) {
    report(i / set.parts.length);
    for (const unit of await unpack(id)) places.push(unit.examples.map(([document, position]) => [document, position]));
  }
  placesOf.set(set, places);
  return places;
}

// Units with windows that hold the text, those with most of them first: Map unit -> { count, example }.
async function searchText(set, query, report) {
  const wanted = query.toLowerCase();
  const found = new Map(); // document -> first and last token of each place that holds the text
  (await documents()).forEach((ids, number) => {
    const words = ids.map((id) => index.vocab[id].toLowerCase()), text = words.join("");
    let place = text.indexOf(wanted);
    if (place < 0) return;
    const ends = [];
    words.reduce((end, word) => (ends.push(end + word.length), end + word.length), 0);
    const tokenAt = (character) => ends.findIndex((end) => character < end);
    found.set(number, []);
    for (; place >= 0; place = text.indexOf(wanted, place + 1)) {
      found.get(number).push([tokenAt(place), tokenAt(place + wanted.length - 1)]);
    }
  });
  const units = [];
  (await allPlaces(set, report)).forEach((examples, unit) => {
    const held = ([document, position]) =>
      found.get(document)?.some(([first, last]) => first >= position - BACK && last <= position + AHEAD);
    const count = examples.filter(held).length;
    if (count) units.push([unit, { count, example: examples.findIndex(held) }]);
  });
  return new Map(units.sort((a, b) => b[1].count - a[1].count));
}

// Text that can be seen -----------------------------------------------------------------------------------------------

// Line breaks, tabs, other control characters, and marks that would turn the direction of what follows or show nothing.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

function visible(text) {
  return text.replace(HIDDEN, (sign) => {
    const code = sign.codePointAt(0);
    if (sign === "\n") return "↵";
    if (sign === "\t") return "⇥";
    return `⟨${code.toString(16).toUpperCase().padStart(2, "0")}⟩`;
  });
}

// A token that stands alone: spaces at its ends are shown too.
function visibleToken(text) {
  const spaces = (match) => "␣".repeat(match.length);
  return visible(text).replace(/^ +| +$/g, spaces) || "(empty)";
}

// A token as a word among others.
const wordOf = (text) => visible(text).trim() || visibleToken(text);

const quoted = (text) => `“${wordOf(text)}”`;

function rounded(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits) return value.toPrecision(1);
  return value.toFixed(digits);
}

function percent(share) {
  const digits = share < 0.1 ? 2 : 0;
  return `${share && share < 0.001 ? (100 * share).toPrecision(1) : (100 * share).toFixed(digits)} %`;
}

// A measure's value as it is shown.
function inWords(measure, value) {
  if (value === null) return "–";
  if (measure === "frequency") return percent(value);
  return rounded(value, { clusters: 0, examples: 0, participation: 1 }[measure] ?? 2);
}

const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
