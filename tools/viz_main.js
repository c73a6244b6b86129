// Main: what the user does, and what is drawn anew for it.

function search(query) {
  state.query = query.trim();
  const found = DATA.tensors.map((t, i) => i).filter(matches);
  byId("found").textContent = state.query === "" ? "" : `${found.length} of ${DATA.tensors.length} tensors`;
  markRibbons();
  drawTable();
  return found;
}

function setDepth(depth) {
  state.depth = Math.min(Math.max(depth, 1), DATA.deepest);
  state.opened.clear();
  drawGraph();
}

function setZoom(zoom) {
  state.zoom = Math.min(Math.max(zoom, 0.1), 4);
  const drawing = byId("drawing");
  const [, , width, height] = drawing.getAttribute("viewBox").split(" ").map(Number);
  drawing.setAttribute("width", width * state.zoom);
  drawing.setAttribute("height", height * state.zoom);
}

function showRung(k) {
  stand(k);
  drawGraph();
  drawLegend();
  drawLadder(k);
  drawTable();
  drawTimeline();
  if (state.chosen !== null) showTensor(state.chosen);
}

// The whole width of the graph, where the window is narrow.
function fitZoom() {
  const [, , width] = byId("drawing").getAttribute("viewBox").split(" ").map(Number);
  return Math.min(1, byId("graph").clientWidth / width);
}

// Drag the graph; a click that moved nothing stays a click.
function dragging(pane) {
  let from = null;
  pane.addEventListener("pointerdown", (event) => {
    if (event.button === 0) from = { x: event.clientX, y: event.clientY, left: pane.scrollLeft, top: pane.scrollTop };
  });
  window.addEventListener("pointermove", (event) => {
    if (!from) return;
    pane.classList.toggle("dragged", Math.hypot(event.clientX - from.x, event.clientY - from.y) > 4);
    pane.scrollLeft = from.left - (event.clientX - from.x);
    pane.scrollTop = from.top - (event.clientY - from.y);
  });
  window.addEventListener("pointerup", () => {
    from = null;
    setTimeout(() => pane.classList.remove("dragged")); // after the click that may follow
  });
  pane.addEventListener("click", (event) => pane.classList.contains("dragged") && event.stopPropagation(), true);
  pane.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      setZoom(state.zoom * (event.deltaY < 0 ? 1.15 : 1 / 1.15));
    },
    { passive: false },
  );
}

function listen() {
  byId("search").addEventListener("input", (event) => search(event.target.value));
  byId("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const found = search(event.target.value);
    const next = found[(found.indexOf(state.chosen) + 1) % found.length];
    if (next !== undefined) chooseTensor(next);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target === byId("search")) return;
    event.preventDefault();
    byId("search").focus();
  });
  byId("shallower").addEventListener("click", () => setDepth(state.depth - 1));
  byId("deeper").addEventListener("click", () => setDepth(state.depth + 1));
  byId("in").addEventListener("click", () => setZoom(state.zoom * 1.25));
  byId("out").addEventListener("click", () => setZoom(state.zoom / 1.25));
  byId("fit").addEventListener("click", () => setZoom(1));
  byId("slider").addEventListener("input", (event) => showRung(Number(event.target.value)));
  byId("planned").addEventListener("click", () => showRung(null));
  byId("timeline").addEventListener("pointermove", pointAtMoment);
  byId("timeline").addEventListener("click", (event) => {
    pointAtMoment(event);
    if (moment !== null) showHeld();
  });
  dragging(byId("graph"));
}

drawHeader();
drawLegend();
drawGraph();
drawTimeline();
drawLadder();
drawTable();
setZoom(fitZoom());
listen();
showList("Largest saved tensors", DATA.tensors.map((t, i) => i).sort((a, b) => now[b].after - now[a].after).slice(0, 12));
