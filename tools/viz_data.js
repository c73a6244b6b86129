// Data: the plan as the page got it, what is shown of it now, and how numbers are spelled.
//
// DATA.tensors[i]: name, module, source, op, shape, dtype, before, after (bytes), readers,
//   recompute, rep, kind, numel, variance, share, reason, masked, alive ([first, last] moment that
//   holds it, or null), alts ([index into DATA.specs, bytes, noise, kind], least noise first),
//   histograms ({title, low, high, counts}; none unless made with --values).
// DATA.points[k]: a plan of the Pareto curve, from the highest peak down: peak, saved (bytes),
//   variance, overhead, planned (bytes at each moment), and for each tensor its fate: [index into
//   DATA.specs, bytes, noise, kind]. Empty unless made with --points.
// DATA.tree: path, label, tensors (positions), children, members (the layers folded into it).

const DATA = JSON.parse(document.getElementById("data").textContent);

// What each tensor is now: the plan's, or what the slider made of it.
const now = DATA.tensors.map(fateOf);

function fateOf(t) {
  return { rep: t.rep, kind: t.kind, after: t.after, noise: t.variance ?? 0 };
}

const state = {
  depth: DATA.depth,
  opened: new Map(), // path -> "children", "members" or "closed": clicked, against the depth
  chosen: null, // position of a tensor
  rung: null, // where the slider stands; null: the plan
  query: "",
  zoom: 1,
  sort: { column: null, down: true },
};

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const megabytes = (size) => (size / 1e6).toFixed(2);
const percent = (share) => (share === null ? "?" : share === 0 ? "0" : `${+(100 * share).toPrecision(3)} %`);
const small = (x) => (x === 0 ? "0" : Math.abs(x) < 1e-3 ? x.toExponential(2) : x.toPrecision(3));
const bitsOf = (bytes, numel) => (8 * bytes) / Math.max(numel, 1);
const colour = (kind) => DATA.kinds[kind][0];
const specName = (alternative) => DATA.specs[alternative[0]];

// "transform(basis=…)" names tables by hashes: its family says enough beside the bits.
const shortSpec = (spec) => (spec.length > 28 ? spec.split("(")[0] : spec);

// --- elements -----------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children); // text stays text: names of modules are never parsed as HTML
  return node;
}

// --- search -------------------------------------------------------------------------------------

const haystacks = DATA.tensors.map((t) =>
  [t.name, t.module, t.op, t.source, t.dtype, t.reason, ...t.readers].join(" ").toLowerCase(),
);

// Every word must occur, in the tensor or in what it is stored as.
function matches(i) {
  const text = `${haystacks[i]} ${now[i].rep} ${now[i].kind}`.toLowerCase();
  return state.query.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

// --- the ladder: from everything at its best to everything at its smallest -----------------------

// A tensor's moves along the convex hull of (bytes, noise), each with the noise a byte it costs.
function movesOf(t, i) {
  const hull = [];
  // A view costs nothing to keep only while the tensor that counts its bytes is kept as well.
  const isFree = (a) => t.before === 0 && t.rep !== "keep" && specName(a) === "keep";
  for (const alternative of t.alts.filter((a) => !isFree(a))) {
    const [, bytes, noise] = alternative;
    if (hull.length && bytes >= hull.at(-1)[1]) continue;
    while (hull.length > 1) {
      const [, b1, n1] = hull.at(-2), [, b2, n2] = hull.at(-1);
      if ((n2 - n1) * (b2 - bytes) <= (noise - n2) * (b1 - b2)) break;
      hull.pop();
    }
    hull.push(alternative);
  }
  return hull.map((to, step) => {
    const from = hull[step - 1];
    const price = from ? (to[2] - from[2]) / (from[1] - to[1]) : -1; // the first: where it starts
    return { i, to, price, step };
  });
}

// Masks are hoisted whatever a tensor is coded as, and not in the price of an alternative.
function maskBytes(t) {
  const chosen = t.alts.find((a) => specName(a) === t.rep);
  return t.rep === "keep" || !chosen ? 0 : Math.max(0, t.after - chosen[1]);
}

const masks = DATA.tensors.map(maskBytes);

function fateUnder(move) {
  const [, bytes, noise, kind] = move.to;
  const rep = specName(move.to);
  return { rep, kind, after: bytes + (rep === "keep" ? 0 : masks[move.i]), noise };
}

const moves = DATA.tensors.flatMap((t, i) => (t.alts.length > 1 ? movesOf(t, i) : []));
moves.sort((a, b) => a.price - b.price || a.step - b.step);
const starts = moves.filter((m) => m.step === 0).length;

// Totals after each move: [saved bytes, noise]. The first entry has every tensor at its best.
function walk() {
  const fates = DATA.tensors.map(fateOf);
  let bytes = sum(fates.map((f) => f.after)), noise = sum(fates.map((f) => f.noise));
  const totals = [];
  moves.forEach((move, k) => {
    const before = fates[move.i], after = fateUnder(move);
    bytes += after.after - before.after;
    noise += after.noise - before.noise;
    fates[move.i] = after;
    if (k >= starts - 1) totals.push([bytes, Math.max(noise, 0)]);
  });
  return totals;
}

// What the slider goes through: plans of the Pareto curve, or rungs of the ladder.
const hasPoints = DATA.points.length > 1;
const ladder = hasPoints ? DATA.points.map((p) => [p.peak, p.variance]) : moves.length ? walk() : [];

// Show rung k, or the plan itself for null.
function stand(k) {
  state.rung = k;
  DATA.tensors.forEach((t, i) => (now[i] = fateOf(t)));
  if (k !== null && hasPoints)
    DATA.points[k].fates.forEach(([spec, after, noise, kind], i) => (now[i] = { rep: DATA.specs[spec], kind, after, noise }));
  else if (k !== null) moves.slice(0, starts + k).forEach((m) => (now[m.i] = fateUnder(m)));
}
