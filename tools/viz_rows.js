// Rows: the graph. A module is a row, its forward left and its backward right; what it saves are the
// ribbons between, as thick as their bytes: pale what plain Inductor saves, full what is saved now.

const LEFT = 10, BOX = 230, GAP = 520, LINE = 19, THICK = 26, SINGLE = 6;

function* visibleRows(node = DATA.tree, level = 0) {
  const unfolds = level < state.depth && node.children.length > 0;
  const how = state.opened.get(node.path) ?? (unfolds ? "children" : "closed");
  if (how === "closed") {
    yield { node, level, tensors: allTensors(node) };
    return;
  }
  if (node.path) yield { node, level, tensors: [], heading: true };
  if (how === "members") {
    for (const member of node.members) yield* visibleRows(member, level + 1);
    return;
  }
  if (node.tensors.length) yield { node, level: level + 1, tensors: node.tensors, own: true };
  for (const child of node.children) yield* visibleRows(child, level + 1);
}

function allTensors(node) {
  return [...node.tensors, ...node.children.flatMap(allTensors)];
}

// Tensors of a row as ribbons: few ones one by one, many by what became of them.
function ribbonsOf(tensors) {
  const groups = new Map();
  for (const i of tensors) {
    const isAside = now[i].kind === "keep" || now[i].kind === "shape";
    const reason = isAside ? DATA.tensors[i].reason : "";
    const alone = tensors.length <= SINGLE && !isAside;
    const key = alone ? i : `${now[i].kind}|${reason}`;
    if (!groups.has(key)) groups.set(key, { kind: now[i].kind, reason, tensors: [] });
    groups.get(key).tensors.push(i);
  }
  const order = Object.keys(DATA.kinds);
  return [...groups.values()].sort((a, b) => order.indexOf(a.kind) - order.indexOf(b.kind));
}

function ribbonLabel(ribbon) {
  const held = ribbon.tensors.map((i) => DATA.tensors[i]);
  const before = sum(held.map((t) => t.before)), after = sum(ribbon.tensors.map((i) => now[i].after));
  const noise = sum(ribbon.tensors.map((i) => now[i].noise)), whole = sum(now.map((f) => f.noise));
  const name = held.length === 1 ? held[0].name : `${ribbon.kind} ×${held.length}`;
  const coded = !["keep", "shape", "recompute"].includes(ribbon.kind);
  const bits = coded ? ` at ${+bitsOf(after, sum(held.map((t) => t.numel))).toPrecision(2)} bits` : "";
  const masked = coded && held.some((t) => t.masked) ? " with masks" : "";
  const share = noise > 0 ? `, ${percent(noise / whole)} of the noise` : "";
  const what = held.length === 1 && !coded ? `: ${ribbon.kind}` : "";
  const why = ribbon.reason ? ` (${ribbon.reason})` : "";
  return `${name}${what}${bits}${masked}, ${megabytes(before)} → ${megabytes(after)} MB${share}${why}`;
}

function drawGraph() {
  const shown = [...visibleRows()];
  const largest = Math.max(1, ...shown.map((r) => sum(r.tensors.map((i) => DATA.tensors[i].before))));
  const thickness = (bytes) => (bytes ? Math.max(1.5, (THICK * bytes) / largest) : 0);
  const width = LEFT + 2 * BOX + GAP + 10;
  const parts = [];
  let y = 24;
  for (const row of shown) {
    const group = drawn("g", { class: "row", "data-path": row.node.path });
    y += row.heading ? drawHeading(group, row, y) : drawRow(group, row, y, thickness, width);
    parts.push(group);
  }
  const flow = drawn("path", { class: "flow", d: flowLine(width, y) });
  const ends = [["forward ↓", LEFT], ["backward ↑", width - BOX - 10]].map(([text, x]) =>
    drawn("text", { class: "end", x, y: 14 }, text),
  );
  const drawing = byId("drawing");
  drawing.setAttribute("viewBox", `0 0 ${width} ${y + 24}`);
  drawing.setAttribute("width", width * state.zoom);
  drawing.setAttribute("height", (y + 24) * state.zoom);
  drawing.replaceChildren(flow, ...ends, ...parts);
  byId("depth").textContent = state.depth;
  markRibbons();
}

// The step runs down the left side, through the loss, and up the right side.
function flowLine(width, y) {
  const left = LEFT + BOX / 2, right = width - 10 - BOX / 2;
  return `M${left} 18 V${y + 6} Q${left} ${y + 14} ${left + 8} ${y + 14} H${right - 8} Q${right} ${y + 14} ${right} ${y + 6} V18`;
}

function drawHeading(group, row, y) {
  const fold = () => unfold(row.node.path, "closed");
  group.append(
    drawn("text", { class: "heading", x: LEFT + 12 * (row.level - 1), y: y + 13, onclick: fold }, `▾ ${titleOf(row.node)}`),
  );
  return LINE;
}

function drawRow(group, row, y, thickness, width) {
  const ribbons = ribbonsOf(row.tensors);
  const heights = ribbons.map((r) => LINE + Math.max(0, thickness(beforeOf(r)) - 8));
  const height = Math.max(LINE + 4, sum(heights) + 4);
  const indent = 12 * Math.max(0, row.level - 1);
  const opens = !row.own && (row.node.children.length > 0 || row.node.members.length > 0);
  const open = opens ? () => unfold(row.node.path, row.node.children.length ? "children" : "members") : null;
  for (const [x, wide] of [[LEFT + indent, BOX - indent], [width - 10 - BOX, BOX]]) {
    const look = { x, y, width: wide, height, rx: 5, class: opens ? "box folds" : "box" };
    group.append(drawn("rect", open ? { ...look, onclick: open } : look));
  }
  const title = row.own ? `${titleOf(row.node)} itself` : titleOf(row.node);
  const label = { class: "heading", x: LEFT + indent + 8, y: y + 15 };
  group.append(drawn("text", open ? { ...label, onclick: open } : label, `${opens ? "▸ " : ""}${clippedStart(title, BOX - indent - 50)}`));
  group.append(drawn("text", { class: "echo", x: width - BOX, y: y + 15 }, clippedStart(title, BOX - 30)));
  group.append(drawn("title", {}, row.node.path || "top level"));
  if (row.node.members.length && row.node.children.length) {
    const each = () => unfold(row.node.path, "members");
    group.append(drawn("text", { class: "heading each", x: LEFT + BOX - 34, y: y + 15, onclick: each }, "each"));
  }
  let at = y + 2;
  ribbons.forEach((ribbon, k) => {
    const ends = [LEFT + BOX, width - 10 - BOX];
    group.append(drawRibbon(ribbon, ends, at + heights[k] / 2, thickness));
    at += heights[k];
  });
  return height + 5;
}

const beforeOf = (ribbon) => sum(ribbon.tensors.map((i) => DATA.tensors[i].before));

function drawRibbon(ribbon, [x1, x2], y, thickness) {
  const after = sum(ribbon.tensors.map((i) => now[i].after));
  const line = (name, width, opacity) =>
    drawn("line", { class: name, x1, x2, y1: y, y2: y, stroke: colour(ribbon.kind), "stroke-width": width, "stroke-opacity": opacity });
  const choose = () => (ribbon.tensors.length === 1 ? chooseTensor(ribbon.tensors[0]) : showList(ribbonLabel(ribbon), ribbon.tensors));
  const label = ribbonLabel(ribbon);
  const shown = clippedEnd(label, GAP - 30);
  const middle = (x1 + x2) / 2, room = LETTER * shown.length + 10;
  return drawn(
    "g",
    { class: "ribbon", "data-tensors": ribbon.tensors.join(" "), onclick: choose },
    drawn("title", {}, label),
    line("target", LINE, 0),
    line("whole", thickness(beforeOf(ribbon)), 0.28),
    line("rest", thickness(after), 0.95),
    drawn("rect", { class: "plate", x: middle - room / 2, y: y - 7, width: room, height: 14, rx: 4 }),
    drawn("text", { class: "label", x: middle, y: y + 4 }, shown),
  );
}

function titleOf(node) {
  const path = node.path || "top level";
  return node.members.length ? `${path} ×${node.members.length}` : path;
}

const LETTER = 6; // pixels, on average

// Paths are cut at their beginning: the end tells them apart.
function clippedStart(text, width) {
  const room = Math.floor(width / LETTER);
  return text.length <= room ? text : `…${text.slice(1 - room)}`;
}

function clippedEnd(text, width) {
  const room = Math.floor(width / LETTER);
  return text.length <= room ? text : `${text.slice(0, room - 1)}…`;
}

function unfold(path, how) {
  state.opened.set(path, how);
  drawGraph();
}

// Dim what the search does not find, mark what is chosen.
function markRibbons() {
  for (const ribbon of document.querySelectorAll(".ribbon")) {
    const held = ribbon.dataset.tensors.split(" ").map(Number);
    ribbon.classList.toggle("dim", state.query !== "" && !held.some(matches));
    ribbon.classList.toggle("chosen", held.includes(state.chosen));
  }
}
