// The roofline, and what the critical path spends its time on.

function roofline(chip) {
  const roof = chip.roofline;
  const width = 560, height = 320, left = 62, right = 24, top = 14, bottom = 40;
  const speed = roof.flops / roof.seconds, best = Math.max(roof.peak, ...Object.values(roof.peaks));
  const intensities = [roof.bytes, roof.moved].filter((b) => b > 0).map((b) => roof.flops / b);
  if (chip.operators.length) intensities.push(...operatorPoints(chip).map((p) => p.intensity));
  if (!roof.flops || !intensities.length) {
    return make("p", { class: "soft" }, "It computes nothing that counts as an operation: " +
      `${bytes(roof.bytes)} in ${time(chip.total)} are ${si(roof.bytes / roof.seconds, "B/s")}, ` +
      `of ${si(roof.bandwidth, "B/s")} published.`);
  }
  const ridge = best / roof.attainable;
  const low = Math.floor(Math.log10(Math.min(...intensities, ridge / 30)));
  const high = Math.ceil(Math.log10(Math.max(...intensities, ridge * 4)));
  const topmost = Math.log10(best * 2.2);
  const lowest = Math.min(Math.log10(speed) - 0.4, Math.log10(best) - 3);
  const x = (v) => left + (width - left - right) * (Math.log10(v) - low) / (high - low);
  const y = (v) => top + (height - top - bottom) * (topmost - Math.log10(v)) / (topmost - lowest);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img" });
  const line = (a, b, c, d, color, dash, thick) => svg.append(make("line", { x1: a, y1: b, x2: c, y2: d,
    stroke: color, "stroke-width": thick || 1, "stroke-dasharray": dash }));
  const text = (at, up, what, anchor, kind) => svg.append(make("text",
    { x: at, y: up, "text-anchor": anchor || "start", class: kind }, what));
  for (let power = low; power <= high; power++) {
    line(x(10 ** power), top, x(10 ** power), height - bottom, "var(--line)");
    text(x(10 ** power), height - bottom + 15, power < 0 ? String(10 ** power) : (10 ** power).toLocaleString("en"), "middle", "soft");
  }
  for (let power = Math.ceil(lowest); power <= topmost; power++) {
    line(left, y(10 ** power), width - right, y(10 ** power), "var(--line)");
    text(left - 6, y(10 ** power) + 4, si(10 ** power, ""), "end", "soft");
  }
  text((left + width - right) / 2, height - 6, "operations a byte", "middle", "soft");
  text(left + 4, top + 8, "operations a second", "start", "soft");
  const slope = (bandwidth, peak, color, dash) => {
    const from = Math.max(10 ** low, 10 ** lowest / bandwidth);
    line(x(from), y(from * bandwidth), x(peak / bandwidth), y(peak), color, dash, 2);
  };
  const levels = new Map();
  for (const [name, peak] of Object.entries(roof.peaks)) {
    levels.set(peak, [...(levels.get(peak) || []), name]);
  }
  for (const [peak, names] of levels) {
    const mine = peak === roof.peak;
    line(x(peak / roof.bandwidth), y(peak), width - right, y(peak), mine ? "var(--accent)" : "var(--soft)",
      mine ? null : "3 3", mine ? 2 : 1);
    text(width - right, y(peak) - 4, `${short(names)} ${si(peak, "")}`, "end", mine ? "" : "soft");
  }
  slope(roof.bandwidth, best, "var(--accent)");
  if (roof.attainable !== roof.bandwidth) slope(roof.attainable, roof.peak, "var(--soft)", "5 3");
  const points = [[roof.bytes, "var(--wait)", "at the bytes that must move"],
    [roof.moved, "var(--good)", "at the bytes that did move"]];
  const clamp = (v) => Math.max(v, 10 ** lowest);
  for (const point of chip.operators.length ? operatorPoints(chip) : []) {
    svg.append(make("circle", { cx: x(point.intensity), cy: y(clamp(point.speed)), r: point.size, fill: point.color,
      "fill-opacity": 0.75 }, make("title", {}, point.what)));
  }
  for (const [amount, color, what] of chip.operators.length ? [] : points) {
    if (!(amount > 0)) continue;
    const dot = make("circle", { cx: x(roof.flops / amount), cy: y(speed), r: 5.5, fill: color },
      make("title", {}, `${si(speed, "op/s")} ${what}`));
    svg.append(dot);
  }
  const share = roof.attainable === roof.bandwidth ? "" :
    `, dashed ${si(roof.attainable, "B/s")} as simulated`;
  if (chip.operators.length) {
    return make("div", {}, svg, legend([...stepColors(chip)].map(([name, color]) => [color, name])),
      make("p", { class: "soft" }, `A point for each operator that computes, as large as its part of the step, at the bytes that must ` +
        `move; ${roof.memory} ${si(roof.bandwidth, "B/s")} published${share}.`));
  }
  return make("div", {}, svg, legend([
    ["var(--wait)", `${si(speed, "op/s")} at the bytes that must move (${bytes(roof.bytes)})`],
    ["var(--good)", `at those that did (${bytes(roof.moved)})`],
    ["var(--accent)", `${roof.memory} ${si(roof.bandwidth, "B/s")} published${share}`]]));
}

function short(names) {
  const known = { bfloat16: "bf16", float16: "f16", float32: "f32", float8_e4m3fn: "fp8", float8_e5m2: "fp8",
    float4_e2m1fn: "fp4" };
  return [...new Set(names.map((name) => known[name] || name))].join(", ");
}

// What the end waited for: the path as parts of the whole time, and its largest parts.
function criticalPath(chip) {
  const kinds = {};
  for (const part of chip.path) kinds[part.what] = (kinds[part.what] || 0) + part.time;
  const order = Object.entries(kinds).sort((a, b) => b[1] - a[1]);
  const says = { compute: "computing", transfer: "bytes flowing", latency: "latency of a DMA",
    issue: "issuing a DMA", signal: "a signal on its way", launch: "launch", idle: "nothing" };
  return make("div", {},
    make("p", { class: "soft" }, "From the end back: each instruction, and what it had to wait for. Only what is on this path can make the program faster."),
    bar(order.map(([what, ps]) => [ps / chip.total, PATH[what], says[what]])),
    legend(order.map(([what, ps]) => [PATH[what], `${says[what]} ${percent(ps / chip.total)}`])),
    grid([["", (p) => [make("span", { class: "swatch", style: `background:${PATH[p.what]}` }),
      p.name ? `${p.name}${p.what === "compute" ? "" : `: ${says[p.what]}`}` : says[p.what]], "wide"],
      ["LINE", (p) => make("code", {}, p.place)],
      ["TIME", (p) => time(p.time), "right"], ["SHARE", (p) => percent(p.time / chip.total), "right"]],
    chip.path.slice(0, 7)));
}
