// Panels: details of a tensor, memory over the step, bytes against noise, the table.

// --- header -------------------------------------------------------------------------------------

function drawHeader() {
  const plan = DATA.plan;
  document.title = `${DATA.title} · fxcompress`;
  byId("title").textContent = DATA.title;
  byId("note").textContent = plan.note;
  const mb = (size) => `${megabytes(size)} MB`;
  const cards = [
    ["policy", plan.policy],
    ["budget (peak)", plan.budget_mb === null ? "none" : `${plan.budget_mb} MB`],
    ["saved, all kept", mb(plan.before)],
    ["saved, planned", `${mb(plan.after)} (÷${(plan.before / Math.max(plan.after, 1)).toFixed(1)})`],
    ["saved, measured", plan.measured_saved === null ? "not run" : mb(plan.measured_saved)],
    ["peak, all kept", mb(plan.plain_peak)],
    ["peak, planned", mb(plan.planned_peak)],
    ["peak, measured", plan.measured_peak === null ? "not run" : mb(plan.measured_peak)],
    [`gradient variance, ${plan.calibrated ? "measured" : "guessed"}`, varianceText()],
  ];
  if (plan.slowdown !== null) cards.push(["step longer by, estimated", percent(plan.slowdown)]);
  if (plan.gap !== null) cards.push(["best plan is better by", `at most ${percent(plan.gap)}`]);
  if (plan.graphs > 1) cards.push(["graphs", plan.graphs]);
  byId("cards").replaceChildren(
    ...cards.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, `${value}`))),
  );
}

// A policy may choose codecs that nobody weighed.
function varianceText() {
  const unweighed = DATA.tensors.filter((t) => t.variance === null).length;
  if (unweighed === 0) return small(DATA.plan.variance);
  return DATA.plan.variance === 0 ? "not weighed" : `${small(DATA.plan.variance)} and ${unweighed} tensors not weighed`;
}

function drawLegend() {
  const used = new Set([...now.map((f) => f.kind)]);
  const shown = Object.entries(DATA.kinds).filter(([name]) => used.has(name));
  byId("legend").replaceChildren(
    ...shown.map(([name, [tint, meaning]]) =>
      element("span", { title: meaning }, element("i", { class: "swatch", style: `background:${tint}` }), name),
    ),
  );
}

// --- details ------------------------------------------------------------------------------------

function chooseTensor(i) {
  state.chosen = i;
  reveal(i);
  showTensor(i);
  markRibbons();
  document.querySelector(".ribbon.chosen")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  for (const row of byId("rows").children) row.classList.toggle("chosen", Number(row.dataset.tensor) === i);
  drawTimeline();
}

// Open a folded module that hides the tensor only if no row stands for it at all.
function reveal(i) {
  const seen = [...document.querySelectorAll(".ribbon")].some((r) => r.dataset.tensors.split(" ").includes(`${i}`));
  if (!seen) {
    state.opened.clear();
    drawGraph();
  }
}

function showTensor(i) {
  const t = DATA.tensors[i], fate = now[i];
  const bits = bitsOf(fate.after, t.numel);
  const facts = [
    ["module", t.module || "top level"],
    ["source", t.source || "unknown"],
    ["made by", t.op],
    ["shape", `${t.shape} ${t.dtype}`],
    ["readers", t.readers.join(", ") || "none"],
    ["rebuilt by", t.recompute.length ? `${t.recompute.length} cheap steps: ${t.recompute.join(", ")}` : "no cheap steps"],
    ["stored as", fate.rep],
    ["bytes", `${megabytes(t.before)} → ${megabytes(fate.after)} MB, ${+bits.toPrecision(3)} bits an element`],
    ["noise", noiseText(t, fate)],
    ["why", t.reason || "chosen by the policy"],
  ];
  byId("details").replaceChildren(
    element("h2", {}, t.name),
    element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    ...alternativesOf(t, fate),
    ...histogramsOf(t),
  );
}

function noiseText(t, fate) {
  if (t.variance === null && fate.rep === t.rep) return "not weighed";
  const whole = sum(now.map((f) => f.noise));
  return `${small(fate.noise)} of the gradient's square, ${percent(whole ? fate.noise / whole : 0)} of all noise`;
}

function alternativesOf(t, fate) {
  if (t.alts.length < 2) return [element("p", { class: "faint" }, "no alternatives were weighed")];
  const rows = t.alts.map((a) => {
    const isChosen = specName(a) === fate.rep;
    return element(
      "tr",
      { class: isChosen ? "chosen" : null, title: specName(a) },
      element("td", {}, element("i", { class: "swatch", style: `background:${colour(a[3])}` }), shortSpec(specName(a))),
      element("td", { class: "number" }, bitsOf(a[1], t.numel).toFixed(2)),
      element("td", { class: "number" }, megabytes(a[1])),
      element("td", { class: "number" }, small(a[2])),
    );
  });
  const headings = ["alternative", "bits", "MB", "noise"].map((name, k) => element("th", { class: k ? "number" : null }, name));
  const table = element("table", { id: "alternatives" }, element("thead", {}, element("tr", {}, ...headings)), element("tbody", {}, ...rows));
  return [element("h2", {}, "Alternatives weighed"), table];
}

function histogramsOf(t) {
  return t.histograms.flatMap(({ title, low, high, counts }) => {
    const top = Math.max(...counts, 1), step = 300 / counts.length;
    const bars = counts.map((count, k) =>
      drawn("rect", { x: k * step, width: Math.max(step - 0.5, 0.5), y: 120 - (110 * count) / top, height: (110 * count) / top, fill: colour(t.kind) }),
    );
    const ends = [[0, small(low), "start"], [300, small(high), "end"]].map(([x, text, anchor]) =>
      drawn("text", { x, y: 134, "text-anchor": anchor }, text),
    );
    return [element("h2", {}, title), drawn("svg", { class: "histogram", viewBox: "0 0 300 140" }, ...bars, ...ends)];
  });
}

function showList(title, tensors) {
  const ranked = [...tensors].sort((a, b) => now[b].after - now[a].after || DATA.tensors[b].before - DATA.tensors[a].before);
  const entries = ranked.map((i) =>
    element(
      "li",
      { onclick: () => chooseTensor(i), "data-tensor": i },
      `${DATA.tensors[i].name} `,
      element("span", { class: "faint" }, `${DATA.tensors[i].module || "top level"}: ${megabytes(now[i].after)} MB, ${shortSpec(now[i].rep)}`),
    ),
  );
  byId("details").replaceChildren(element("h2", {}, title), element("ul", {}, ...entries));
}

// --- memory over the step -----------------------------------------------------------------------

const TIME = { width: 1000, height: 190 };
let moment = null;

// The curves of the timeline: [bytes at each moment, name, colour].
function curves() {
  const { plain, planned, measured } = DATA.timeline;
  const isPoint = hasPoints && state.rung !== null;
  const shown = [[plain, "all kept, cheap ones rebuilt", "var(--plain)"]];
  shown.push([planned, "planned", isPoint ? "var(--faint)" : "var(--mark)"]);
  if (isPoint) shown.push([DATA.points[state.rung].planned, `planned at point ${state.rung + 1}`, "var(--mark)"]);
  if (measured.length) shown.push([measured, "measured, by time in either pass: places are approximate", "var(--measured)"]);
  return shown.filter(([values]) => values.length > 0);
}

function drawTimeline() {
  const { plain, nodes, forward } = DATA.timeline;
  const box = byId("timeline");
  if (!nodes.length) {
    box.replaceChildren();
    byId("moment").textContent = "no plan of memory: nothing was changed";
    return;
  }
  const shown = curves();
  const budget = DATA.plan.budget_mb === null ? 0 : DATA.plan.budget_mb * 1e6;
  const peak = DATA.timeline.measured.length ? 0 : (DATA.plan.measured_peak ?? 0); // the curve has it
  const highest = Math.max(...shown.map(([values]) => Math.max(...values)), peak);
  const top = 1.06 * Math.max(highest, budget <= 2 * Math.max(...plain) ? budget : 0);
  const x = (k, count = nodes.length) => (TIME.width * k) / Math.max(count - 1, 1);
  const y = (bytes) => TIME.height * (1 - bytes / top);
  const level = (bytes, name, dash) => drawn("line", { class: `scale ${name}`, x1: 0, x2: TIME.width, y1: y(bytes), y2: y(bytes), "stroke-dasharray": dash });
  const line = ([values, name, stroke]) =>
    drawn("polyline", { stroke, "data-name": name, points: values.map((v, k) => `${x(k, values.length).toFixed(1)},${y(v).toFixed(1)}`).join(" ") });
  const parts = [];
  const alive = state.chosen === null ? null : DATA.tensors[state.chosen].alive;
  if (alive) parts.push(drawn("rect", { class: "alive", x: x(alive[0]), width: Math.max(x(alive[1]) - x(alive[0]), 2), y: 0, height: TIME.height, fill: colour(now[state.chosen].kind) }));
  parts.push(drawn("line", { class: "scale", x1: x(forward - 0.5), x2: x(forward - 0.5), y1: 0, y2: TIME.height }));
  if (budget && budget < top) parts.push(level(budget, "budget", "6 4"));
  if (peak) parts.push(level(peak, "measured", "2 3"));
  parts.push(...shown.map(line));
  if (moment !== null) parts.push(drawn("line", { class: "cursor", x1: x(moment), x2: x(moment), y1: 0, y2: TIME.height }));
  box.replaceChildren(...parts);
  const marks = shown.map(([values, name, tint]) => [y(Math.max(...values)), `${name} ${megabytes(Math.max(...values))} MB`, tint]);
  if (budget && budget < top) marks.push([y(budget), `budget ${DATA.plan.budget_mb} MB`, "var(--faint)"]);
  if (peak) marks.push([y(peak), `measured peak ${megabytes(peak)} MB`, "var(--faint)"]);
  drawTicks(box, marks);
}

// Text beside a stretched drawing would be stretched with it: it stands over the drawing instead.
function drawTicks(box, marks) {
  box.parentNode.querySelectorAll(".tick").forEach((tick) => tick.remove());
  let last = -14;
  for (const [top, text, tint] of marks.sort((a, b) => a[0] - b[0])) {
    last = Math.max(top, last + 14);
    box.parentNode.append(element("span", { class: "tick", style: `top:${last}px;color:${tint}` }, text));
  }
}

function pointAtMoment(event) {
  const box = byId("timeline").getBoundingClientRect();
  const last = DATA.timeline.nodes.length - 1;
  if (last < 0) return;
  const at = Math.round((last * (event.clientX - box.left)) / box.width);
  moment = Math.min(Math.max(at, 0), last);
  const { nodes, modules, plain, planned, measured, forward } = DATA.timeline;
  const phase = moment < forward ? "forward" : "backward";
  const place = modules[moment] ? ` in ${modules[moment]}` : "";
  byId("moment").textContent = `${phase}, ${nodes[moment]}${place}: ${megabytes(planned[moment])} MB planned, ${megabytes(plain[moment])} MB all kept${measured.length ? `, about ${megabytes(measured[moment])} MB measured` : ""}`;
  drawTimeline();
}

// What holds the memory at the moment under the cursor.
function showHeld() {
  const held = DATA.tensors.map((t, i) => i).filter((i) => {
    const alive = DATA.tensors[i].alive;
    return alive && alive[0] <= moment && moment <= alive[1] && now[i].after > 0;
  });
  const total = megabytes(sum(held.map((i) => now[i].after)));
  showList(`Held at ${DATA.timeline.nodes[moment]}: ${held.length} tensors, ${total} MB`, held);
  const path = DATA.timeline.modules[moment];
  const rows = [...document.querySelectorAll(".row")];
  const near = rows.filter((r) => r.dataset.path && `${path}.`.startsWith(`${r.dataset.path}.`)).at(-1);
  near?.scrollIntoView({ block: "nearest" });
}

// --- bytes against noise ------------------------------------------------------------------------

function drawLadder(k = null) {
  const slider = byId("slider");
  if (ladder.length < 2) {
    byId("ladder").hidden = true;
    return;
  }
  slider.max = ladder.length - 1;
  if (hasPoints) byId("about-ladder").textContent = "plans of the Pareto curve, from plain Inductor's peak to the lowest; noise as the planner prices it";
  const size = hasPoints ? "planned peak" : "saved";
  const plan = [hasPoints ? DATA.plan.planned_peak : DATA.plan.after, DATA.plan.variance];
  if (k === null) slider.value = nearestRung(plan[0]);
  const [bytes, noise] = k === null ? plan : ladder[k];
  const which = k === null ? "the plan" : hasPoints ? `point ${k + 1} of ${ladder.length}` : `rung ${k} of ${ladder.length - 1}, an estimate`;
  const more = k !== null && hasPoints ? `, saved ${megabytes(DATA.points[k].saved)} MB, step longer by about ${percent(DATA.points[k].overhead)}` : "";
  byId("rung").textContent = `${which}: ${size} ${megabytes(bytes)} MB, gradient variance ${k === null ? varianceText() : small(noise)}${more}`;
  const shown = ladder.filter(([, n]) => n > 0);
  const logs = [...shown, plan].filter(([, n]) => n > 0).map(([, n]) => Math.log10(Math.max(n, 1e-12)));
  const low = Math.min(...logs), high = Math.max(...logs), most = Math.max(ladder[0][0], plan[0]);
  const x = (b) => (1000 * b) / most;
  // No logarithm has a place for 0: what is exact stands at the bottom, below all that is not.
  const y = (n) => (n > 0 ? 180 - (170 * (Math.log10(Math.max(n, 1e-12)) - low)) / Math.max(high - low, 1e-9) : 194);
  const at = (b, n, tint) => drawn("line", { x1: x(b), x2: x(b), y1: y(n) - 6, y2: y(n) + 6, stroke: tint, "stroke-width": 4, "vector-effect": "non-scaling-stroke" });
  byId("curve").replaceChildren(
    drawn("polyline", { stroke: "var(--mark)", points: shown.map(([b, n]) => `${x(b).toFixed(1)},${y(n).toFixed(1)}`).join(" ") }),
    ...(hasPoints ? ladder.map(([b, n]) => at(b, n, "var(--mark)")) : []),
    ...(plan[1] > 0 ? [at(plan[0], plan[1], "var(--plain)")] : []),
    ...(k === null ? [] : [at(bytes, noise, "var(--ink)")]),
  );
  drawTicks(byId("curve"), [
    [2, `variance ${small(10 ** high)}`, "var(--faint)"],
    [178, `variance ${small(10 ** low)}; ${size} bytes from 0 to ${megabytes(most)} MB${plan[1] > 0 ? "; the plan in orange" : ""}${hasPoints ? "; exact ones at the bottom" : ""}`, "var(--faint)"],
  ]);
}

function nearestRung(bytes) {
  const apart = ladder.map(([b]) => Math.abs(b - bytes));
  return apart.indexOf(Math.min(...apart));
}

// --- table --------------------------------------------------------------------------------------

const COLUMNS = [
  ["tensor", (t) => t.name],
  ["module", (t) => t.module],
  ["op", (t) => t.op],
  ["shape", (t) => t.shape],
  ["dtype", (t) => t.dtype],
  ["stored as", (t, f) => shortSpec(f.rep)],
  ["bits", (t, f) => bitsOf(f.after, t.numel), (x) => x.toFixed(2)],
  ["MB before", (t) => t.before, megabytes],
  ["MB after", (t, f) => f.after, megabytes],
  ["noise", (t, f) => f.noise, small],
  ["reason", (t) => t.reason],
];

function drawTable() {
  const headings = COLUMNS.map(([name, , spell], column) => {
    const sorted = state.sort.column === column ? (state.sort.down ? "descending" : "ascending") : null;
    return element("th", { class: spell ? "number" : null, "aria-sort": sorted, onclick: () => sortBy(column) }, name);
  });
  byId("headings").replaceChildren(...headings);
  const order = DATA.tensors.map((t, i) => i).filter((i) => state.query === "" || matches(i));
  if (state.sort.column !== null) {
    const value = COLUMNS[state.sort.column][1];
    const sign = state.sort.down ? -1 : 1;
    const key = (i) => value(DATA.tensors[i], now[i]);
    order.sort((a, b) => sign * (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
  }
  byId("rows").replaceChildren(
    ...order.map((i) => {
      const cells = COLUMNS.map(([, value, spell], column) => {
        const found = value(DATA.tensors[i], now[i]);
        return element("td", { class: spell ? "number" : column ? null : "name" }, spell ? spell(found) : found);
      });
      const look = { "data-tensor": i, class: i === state.chosen ? "chosen" : null, onclick: () => chooseTensor(i) };
      return element("tr", look, ...cells);
    }),
  );
}

function sortBy(column) {
  state.sort = { column, down: state.sort.column === column ? !state.sort.down : true };
  drawTable();
}
