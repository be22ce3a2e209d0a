// A model's step: its operators over the whole step, launch by launch, and as a table.

function stepColors(chip) {
  const names = [...new Set([...chip.operators].sort((a, b) => b.together - a.together).map((o) => o.name))];
  return new Map(names.map((name, n) => [name, PALETTE[n % PALETTE.length]]));
}

// Every launch of the step in order: operators of equal count in a row are a layer, again and again.
function launchesOf(chip) {
  const found = [];
  let at = chip.whole - chip.operators.reduce((sum, o) => sum + o.together, 0);
  for (let first = 0; first < chip.operators.length;) {
    let last = first;
    while (last < chip.operators.length && chip.operators[last].count === chip.operators[first].count) last++;
    for (let turn = 0; turn < chip.operators[first].count; turn++) {
      for (const operator of chip.operators.slice(first, last)) {
        found.push({ operator, turn, from: at, to: at + operator.ps });
        at += operator.ps;
      }
    }
    first = last;
  }
  return found;
}

function stepRow(launches, colors, label) {
  return {
    label, detail: `${launches.length} launches`, height: 34,
    draw(c, chart, y) {
      for (const one of launches) {
        const width = box(c, chart, one.from, one.to, y, 34, colors.get(one.operator.name));
        if (width > 30) inside(c, chart, one.from, one.to, y, 34, one.operator.name);
      }
    },
    hit(ps, _, pixel) {
      const one = launches.find((l) => ps >= l.from - pixel && ps <= l.to + pixel);
      if (!one) return null;
      const o = one.operator, of = o.count > 1 ? ` (${one.turn + 1} of ${o.count})` : "";
      return { text: `${o.name}${of}: ${o.kernel}\n${time(one.from)} to ${time(one.to)}: ${time(o.ps)}\n` +
        `bound by ${o.bound}, ${percent(o.fraction)} of the roofline` };
    },
  };
}

function operators(chip) {
  if (!chip.operators.length) return [];
  const colors = stepColors(chip), launches = launchesOf(chip);
  const rates = launches.map((l) => [l.from, l.operator.moved * 1e12 / Math.max(1, l.operator.ps)]);
  const speeds = launches.map((l) => [l.from, l.operator.flops * 1e12 / Math.max(1, l.operator.ps)]);
  const roof = chip.roofline;
  const chart = new Chart(new View(chip.whole), [
    stepRow(launches, colors, "operators"),
    curveRow(`${roof.memory}, each launch`, rates, roof.bandwidth, (v) => si(v, "B/s"), "#4c78a8", chip.whole),
    curveRow("operations", speeds, roof.peak, (v) => si(v, "op/s"), "#54a24b", chip.whole),
  ]);
  chart.draw();
  const names = [...colors].slice(0, 12).map(([name, color]) => [color, name]);
  return [
    make("h3", {}, "The whole step"),
    make("p", { class: "soft" }, "Every launch in order, with the mean rate of its bytes and operations. Drag a range to zoom, double-click for all."),
    legend(names), make("div", { class: "chart" }, chart.canvas),
    make("h3", {}, "Operators"),
    grid([
      ["OPERATOR", (o) => [make("span", { class: "swatch", style: `background:${colors.get(o.name)}` }), o.name]],
      ["TIMES", (o) => String(o.count), "right"], ["EACH", (o) => time(o.ps), "right"],
      ["TOGETHER", (o) => time(o.together), "right"], ["OF STEP", (o) => percent(o.share), "right"],
      ["", (o) => bar([[o.share, colors.get(o.name), "of the step"]])],
      ["BOUND", (o) => o.bound], ["ROOFLINE", (o) => percent(o.fraction), "right"],
      ["op/s", (o) => o.flops ? si(o.flops * 1e12 / o.ps, "") : "", "right"],
      ["MUST MOVE", (o) => o.bytes ? bytes(o.bytes) : "", "right"], ["MOVED", (o) => bytes(o.moved), "right"],
      ["KERNEL", (o) => make("code", {}, o.kernel)],
    ], chip.operators),
  ];
}

// Where the launches of the timeline are, each once.
function launchRow(chip) {
  const colors = stepColors(chip);
  const shown = chip.operators.map((operator, n) => ({
    operator, turn: 0, from: chip.launches[n][0],
    to: n + 1 < chip.launches.length ? chip.launches[n + 1][0] : chip.total,
  }));
  return stepRow(shown, colors, "operator");
}

// A point for each operator that computes and moves bytes.
function operatorPoints(chip) {
  const colors = stepColors(chip);
  return chip.operators.filter((o) => o.flops && (o.bytes || o.moved)).map((o) => ({
    intensity: o.flops / (o.bytes || o.moved), speed: o.flops * 1e12 / o.ps, color: colors.get(o.name),
    size: 3 + 9 * Math.sqrt(o.share), what: `${o.name}: ${si(o.flops * 1e12 / o.ps, "op/s")}, ${percent(o.share)} of the step`,
  }));
}
