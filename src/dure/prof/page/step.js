// A model's step: its operators over the whole step, launch by launch, and as a table.

function stepColors(chip) {
  const names = [...new Set([...chip.operators].sort((a, b) => b.together - a.together).map((o) => o.name))];
  return new Map(names.map((name, n) => [name, PALETTE[n % PALETTE.length]]));
}

// What ran when, from a time of the step on.
function turnsOf(chip, from) {
  const seen = new Map();
  return chip.turns.map(([number, start, end]) => {
    const turn = seen.get(number) || 0;
    seen.set(number, turn + 1);
    return { operator: chip.operators[number], turn, from: start - from, to: end - from };
  });
}

function stepRow(launches, colors, label, detail) {
  return {
    label, detail, height: 34,
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
      return { text: `${o.name}${of}: ${o.kernel}\n${time(one.from)} to ${time(one.to)}: ${time(one.to - one.from)}\n` +
        `bound by ${o.bound}, ${percent(o.fraction)} of the roofline` };
    },
  };
}

function operators(chip) {
  if (!chip.operators.length) return [];
  const colors = stepColors(chip), turns = turnsOf(chip, 0);
  const rows = chip.overview.map((counter, n) => {
    const rate = counter.unit === "B/s";
    const name = rate ? `${counter.name.replace("memories.", "")} bandwidth` : counter.name;
    return curveRow(name, counter.points, counter.capacity, rate ? (v) => si(v, "B/s") : bytes,
      rate ? "#4c78a8" : "#8c6bb1", chip.whole);
  });
  const chart = new Chart(new View(chip.whole), [stepRow(turns, colors, "operators", `${turns.length} kernels`), ...rows]);
  chart.draw();
  const names = [...colors].slice(0, 12).map(([name, color]) => [color, name]);
  return [
    make("h3", {}, "The whole step"),
    make("p", { class: "soft" }, "What ran when, over a curve of what flows and of what the scratchpad holds. Drag a range to zoom, double-click for all."),
    legend(names), make("div", { class: "chart" }, chart.canvas),
    make("h3", {}, "Operators"),
    make("p", { class: "soft" }, "Each takes from the end of the one before to its own: bytes that stream in while another computes aren't waited for."),
    grid([
      ["OPERATOR", (o) => [make("span", { class: "swatch", style: `background:${colors.get(o.name)}` }), o.name]],
      ["TIMES", (o) => String(o.count), "right"], ["EACH", (o) => time(o.ps), "right"], ["ALONE", (o) => time(o.alone), "right"],
      ["TOGETHER", (o) => time(o.together), "right"], ["OF STEP", (o) => percent(o.share), "right"],
      ["", (o) => bar([[o.share, colors.get(o.name), "of the step"]])],
      ["BOUND", (o) => o.bound], ["ROOFLINE", (o) => percent(o.fraction), "right"],
      ["op/s", (o) => o.flops && o.ps ? si(o.flops * 1e12 / o.ps, "") : "", "right"],
      ["MUST MOVE", (o) => o.bytes ? bytes(o.bytes) : "", "right"], ["MOVED", (o) => bytes(o.moved), "right"],
      ["KERNEL", (o) => make("code", {}, o.kernel)],
    ], chip.operators),
  ];
}

// What ran in the part of the step that the timeline shows.
function launchRow(chip) {
  const from = chip.window ? chip.window[0] : 0;
  const shown = turnsOf(chip, from).filter((t) => t.to > 0 && t.from < chip.total);
  return stepRow(shown, stepColors(chip), "operator");
}

// A point for each operator that computes and moves bytes.
function operatorPoints(chip) {
  const colors = stepColors(chip);
  return chip.operators.filter((o) => o.flops && o.ps && (o.bytes || o.moved)).map((o) => ({
    intensity: o.flops / (o.bytes || o.moved), speed: o.flops * 1e12 / o.ps, color: colors.get(o.name),
    size: 3 + 9 * Math.sqrt(o.share), what: `${o.name}: ${si(o.flops * 1e12 / o.ps, "op/s")}, ${percent(o.share)} of the step`,
  }));
}
