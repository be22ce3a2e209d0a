// The page: summary, then a section for each chip.

const report = JSON.parse(document.getElementById("data").textContent);

const MOST_BUFFERS = 14;

function tiles(chip) {
  const roof = chip.roofline;
  const shown = [[time(chip.whole || chip.total), chip.whole ? "a step" : "time"], [chip.bound, "bound by"],
    [percent(roof.fraction), "of the roofline"]];
  if (roof.flops) shown.push([si(roof.flops / roof.seconds, "op/s"), `of ${si(roof.peak, "op/s")}`]);
  shown.push([si(roof.moved / roof.seconds, "B/s"), `of ${si(roof.bandwidth, "B/s")} ${roof.memory}`]);
  shown.push([chip.facts.confidence || "", "confidence: worst number it rests on"]);
  return make("div", { class: "tiles" }, shown.map(([value, what]) =>
    make("div", { class: "tile" }, make("b", {}, value), make("span", {}, what))));
}

function facts(chip) {
  const skip = new Set(["confidence"]);
  const parts = Object.entries(chip.facts).filter(([name]) => !skip.has(name));
  return make("p", { class: "soft" }, parts.map(([name, value]) => `${name}: ${value}`).join("  ·  "));
}

function comparison(chips) {
  const whole = (chip) => chip.whole || chip.total;
  const slowest = Math.max(...chips.map(whole));
  return grid([
    ["TARGET", (c) => make("a", { href: `#${c.target}`, style: "color:var(--accent)" }, c.target)],
    ["TIME", (c) => time(whole(c)), "right"],
    ["", (c) => bar([[whole(c) / slowest, "var(--accent)", "of the slowest"]])],
    ["BOUND", (c) => c.bound],
    ["ROOFLINE", (c) => percent(c.roofline.fraction), "right"],
    ["op/s", (c) => c.roofline.flops ? si(c.roofline.flops / c.roofline.seconds, "") : "", "right"],
    ["PEAK", (c) => si(c.roofline.peak, ""), "right"],
    ["B/s", (c) => si(c.roofline.moved / c.roofline.seconds, ""), "right"],
    ["PUBLISHED", (c) => si(c.roofline.bandwidth, ""), "right"],
    ["CRITICAL PATH", (c) => pathBar(c)],
    ["CONFIDENCE", (c) => c.facts.confidence || ""],
  ], [...chips].sort((a, b) => whole(a) - whole(b)));
}

function pathBar(chip) {
  const kinds = {};
  for (const part of chip.path) kinds[part.what] = (kinds[part.what] || 0) + part.time;
  return bar(Object.entries(kinds).sort((a, b) => b[1] - a[1]).map(([what, ps]) => [ps / chip.total, PATH[what], what]));
}

function timeline(chip) {
  const order = new Map();
  const tracks = chip.tracks.map((data, number) => new Track(data, number));
  const totals = new Map();
  for (const track of tracks) {
    track.name.forEach((name, n) => totals.set(name, (totals.get(name) || 0) + track.length[n]));
  }
  [...totals].sort((a, b) => b[1] - a[1]).forEach(([name], n) => order.set(name, PALETTE[n % PALETTE.length]));
  const colors = (name) => order.get(name) || "#888888";
  const view = new View(chip.total);
  const charts = make("div", {});
  const rowsOf = (core) => {
    const rows = chip.operators.length ? [launchRow(chip), pathRow(chip)] : [pathRow(chip)];
    for (const track of tracks.filter((t) => t.class === core)) {
      const queue = chip.queues[track.queue];
      rows.push((queue.kind === "compute" ? computeRow : dmaRow)(chip, track, queue, colors));
    }
    for (const counter of chip.counters.filter((c) => c.name.startsWith("memories."))) {
      rows.push(curveRow(`${counter.name.slice(9)} bandwidth`, counter.points, counter.capacity, (v) => si(v, "B/s"), "#4c78a8", chip.total));
    }
    return rows;
  };
  const pick = make("select", {}, chip.classes.slice(0, chip.shown).map((name, n) => make("option", { value: n }, name)));
  if (chip.critical < chip.shown) pick.value = String(chip.critical);
  const button = (text, act) => { const b = make("button", { type: "button" }, text); b.onclick = act; return b; };
  const scratch = new Chart(view, scratchpadRows(chip, colors));
  const show = () => {
    view.charts = [scratch];
    const chart = new Chart(view, rowsOf(Number(pick.value)));
    charts.replaceChildren(make("div", { class: "chart" }, chart.canvas));
    view.draw();
  };
  pick.onchange = show;
  show();
  const names = [...order].slice(0, 12).map(([name, color]) => [color, chip.names[name]]);
  const merged = chip.resolution ? `${chip.count.toLocaleString("en")} instructions: those of less than ` +
    `${time(chip.resolution)} are drawn together; dure trace keeps them all. ` : "";
  return [
    make("h3", {}, chip.window ? `Timeline of ${time(chip.total)} in the middle of the step` : "Timeline"),
    make("div", { class: "tools" }, button("zoom in", () => view.zoom(0.5)), button("zoom out", () => view.zoom(2)),
      button("all", () => view.set(0, chip.total)), chip.classes.length > 1 ? [pick, make("span", { class: "soft" }, `the critical path is that of ${chip.classes[chip.critical]}.`)] : chip.classes[0] || "",
      make("span", { class: "soft" }, `${merged}Drag a range to zoom, ctrl + wheel too; shift + wheel moves; point at a box for its line.`)),
    legend([...names, ["var(--wait)", "waiting for a semaphore (arrow: from what it waited for)"]]),
    charts,
    make("h3", {}, "Scratchpad over time"),
    make("p", { class: "soft" }, chip.memories.map((m) => `${m.name}: ${bytes(m.used)} of ${bytes(m.capacity)} given to buffers` +
      `${m.partitions > 1 ? `, in each of ${m.partitions} partitions` : ""}`).join("; ") + ". A slot is filled from its first write to its last read."),
    make("div", { class: "chart" }, scratch.canvas),
    buffers(chip),
  ];
}

// A buffer has the colour of the loads into it, where there are any.
function scratchpadRows(chip, colors) {
  const rows = [];
  const colorOf = (buffer, place) => {
    const load = chip.names.indexOf(`load ${buffer.name.split(" ")[0]}`);
    return load >= 0 ? colors(load) : PALETTE[(place + 5) % PALETTE.length];
  };
  for (const memory of chip.memories) {
    // Of many launches only the largest buffers have a row.
    const mine = chip.buffers.filter((b) => b.memory === memory.name)
      .sort((a, b) => chip.operators.length ? b.bytes * b.slots - a.bytes * a.slots : 0)
      .slice(0, chip.operators.length ? MOST_BUFFERS : undefined);
    const scale = memory.used < memory.capacity / 4 ? memory.used : memory.capacity;
    rows.push(curveRow(`${memory.name} in use`, memory.points, scale, bytes, "#8c6bb1", chip.total));
    const largest = Math.max(...mine.map((b) => b.bytes));
    mine.forEach((buffer, place) => rows.push(slotRows(chip, buffer, colorOf(buffer, place), largest)));
  }
  return rows;
}

function buffers(chip) {
  const capacity = new Map(chip.memories.map((m) => [m.name, m.capacity]));
  const rows = [...chip.buffers].sort((a, b) => b.bytes * b.slots - a.bytes * a.slots)
    .slice(0, chip.operators.length ? 2 * MOST_BUFFERS : undefined);
  return grid([
    ["BUFFER", (b) => b.name], ["MEMORY", (b) => b.memory], ["TILE", (b) => b.type],
    ["SLOTS", (b) => String(b.slots), "right"], ["BYTES", (b) => bytes(b.bytes * b.slots), "right"],
    ["OF IT", (b) => percent(b.bytes * b.slots / capacity.get(b.memory)), "right"],
    ["AT", (b) => `0x${b.offset.toString(16)}`, "right"],
    ["FILLED", (b) => percent(b.held), "right"],
    ["LINE", (b) => make("code", {}, chip.sources[b.source] ? chip.sources[b.source].place : "")],
    ["", (b) => make("code", {}, chip.sources[b.source] ? chip.sources[b.source].text : ""), "wide"],
  ], rows);
}

function bottlenecks(chip) {
  const part = (ps) => ps / chip.total;
  const several = chip.classes.length > 1;
  const queues = grid([
    ...(several ? [["CORES", (u) => chip.classes[u.class]]] : []),
    ["QUEUE", (u) => u.queue], ["BUSY", (u) => percent(part(u.busy)), "right"],
    ["", (u) => bar([[part(u.busy), "var(--good)", "busy"], [part(u.waiting), "var(--pause)", "waiting, not busy"]])],
    ["WAITING", (u) => percent(part(u.waiting)), "right"],
    ["INSTRUCTIONS", (u) => u.instructions.toLocaleString("en"), "right"],
    ["BYTES", (u) => u.bytes ? bytes(u.bytes) : "", "right"],
    ["WAITS MOST FOR", (u) => u.stalls.map((s) => `${s.semaphore} from ${s.queue} ${time(s.time)}`).join(", "), "wide"],
  ], chip.uses);
  const lines = grid([
    ["QUEUE", (l) => l.queue], ["INSTRUCTION", (l) => l.name], ["TIMES", (l) => l.count.toLocaleString("en"), "right"],
    ["TIME", (l) => time(l.time), "right"], ["ON THE PATH", (l) => percent(part(l.critical)), "right"],
    ["", (l) => bar([[part(l.critical), "var(--accent)", "of the critical path"]])],
    ["LINE", (l) => make("code", {}, l.place)], ["", (l) => make("code", {}, l.text), "wide"],
  ], chip.lines);
  const stalls = grid([
    ["QUEUE", (s) => s.queue], ["WAITED", (s) => time(s.end - s.start), "right"], ["FROM", (s) => time(s.start), "right"],
    ["FOR", (s) => `${s.semaphore} from ${s.by}`], ["BEFORE", (s) => s.before], ["LINE", (s) => make("code", {}, s.place)],
  ], chip.stalls);
  const ways = grid([
    ["SHARED WAY", (r) => r.name], ["BYTES", (r) => bytes(r.bytes), "right"], ["CARRIES", (r) => si(r.capacity, "B/s"), "right"],
    ["AT FULL SPEED", (r) => time(r.busy), "right"], ["OF THE TIME", (r) => percent(part(r.busy)), "right"],
    ["", (r) => bar([[part(r.busy), "var(--good)", "at full speed"]])],
  ], chip.resources);
  return [make("h3", {}, "Queues"), queues, make("h3", {}, "Source lines"), lines,
    make("h3", {}, "Memories, fabrics and DMA engines"), ways,
    ...(chip.stalls.length ? [make("h3", {}, "Longest waits"), stalls] : [])];
}

function programs(chip) {
  return chip.programs.map((program) => make("details", {},
    make("summary", {}, `Program of ${program.name}: ` +
      Object.entries(program.facts).map(([name, value]) => `${name} ${value}`).join(", ")),
    make("pre", {}, program.text)));
}

function section(chip) {
  return make("section", { id: chip.target },
    make("h2", {}, chip.target), tiles(chip), facts(chip),
    ...[...new Set(chip.notes)].slice(0, 8).map((note) => make("p", { class: "soft" }, note)),
    make("div", { class: "pair" },
      make("div", { class: "panel" }, make("h3", {}, "Roofline"), roofline(chip)),
      make("div", { class: "panel" }, make("h3", {}, "Critical path"), criticalPath(chip))),
    ...operators(chip), timeline(chip), bottlenecks(chip), make("h3", {}, "Program"), programs(chip));
}

function build() {
  const chips = report.chips;
  document.body.append(make("div", { id: "tip" }));
  const page = document.getElementById("page");
  page.append(make("h1", {}, report.title),
    make("p", { class: "soft" }, "Compiled, proved free of races, and simulated by dure. Times are of the chip's machine file, not of a chip."));
  if (chips.length > 1) {
    page.append(comparison(chips));
  }
  for (const error of report.errors) {
    page.append(make("h3", {}, error.target), make("div", { class: "wrong" }, error.text));
  }
  for (const chip of chips) page.append(section(chip));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("theme")));
}

build();
