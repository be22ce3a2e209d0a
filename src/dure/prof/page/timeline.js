// Rows over time that zoom together: instructions, transfers, waits, curves and slots of buffers.

const GUTTER = 168, AXIS = 24, GAP = 5;

// The times that all charts of a chip show.
class View {
  constructor(total) {
    this.total = total; this.from = 0; this.to = total; this.charts = []; this.focus = null;
  }
  set(from, to) {
    const least = Math.min(this.total, 2000), length = Math.min(this.total, Math.max(least, to - from));
    this.from = Math.min(Math.max(0, from), this.total - length);
    this.to = this.from + length;
    this.draw();
  }
  zoom(by, at) {
    const place = at === undefined ? (this.from + this.to) / 2 : at;
    this.set(place - (place - this.from) * by, place + (this.to - place) * by);
  }
  draw() { for (const chart of this.charts) chart.draw(); }
}

class Chart {
  constructor(view, rows) {
    this.view = view; this.rows = rows; this.drag = null;
    this.canvas = make("canvas", {});
    this.height = AXIS + rows.reduce((sum, row) => sum + row.height + GAP, 0) + 4;
    this.canvas.style.height = `${this.height}px`;
    view.charts.push(this);
    this.listen();
    addEventListener("theme", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  x(ps) { return GUTTER + (this.width - GUTTER - 8) * (ps - this.view.from) / (this.view.to - this.view.from); }
  ps(x) { return this.view.from + (this.view.to - this.view.from) * (x - GUTTER) / (this.width - GUTTER - 8); }

  draw() {
    const ratio = devicePixelRatio || 1;
    this.width = this.canvas.clientWidth;
    if (!this.width) return;
    this.canvas.width = this.width * ratio; this.canvas.height = this.height * ratio;
    const c = this.c = this.canvas.getContext("2d");
    c.scale(ratio, ratio);
    c.font = '11px system-ui, "Segoe UI", sans-serif';
    c.textBaseline = "middle";
    this.axis(c);
    let y = AXIS;
    for (const row of this.rows) {
      row.y = y;
      c.save();
      c.beginPath(); c.rect(GUTTER, y - 1, this.width - GUTTER - 8, row.height + 2); c.clip();
      c.fillStyle = style("--track");
      if (!row.bare) c.fillRect(GUTTER, y, this.width - GUTTER - 8, row.height);
      row.draw(c, this, y);
      c.restore();
      this.label(c, row, y);
      y += row.height + GAP;
    }
    this.arrows(c);
    if (this.drag && Math.abs(this.drag.to - this.drag.from) > 3) {
      c.fillStyle = "rgba(110,162,255,0.25)";
      c.fillRect(Math.min(this.drag.from, this.drag.to), AXIS, Math.abs(this.drag.to - this.drag.from), this.height);
    }
  }

  label(c, row, y) {
    c.save(); c.beginPath(); c.rect(0, y - 2, GUTTER - 6, row.height + 4); c.clip();
    c.fillStyle = style(row.soft ? "--soft" : "--ink");
    const lines = row.height > 24 && row.detail ? [row.label, row.detail] : [row.label];
    const middle = y + row.height / 2;
    lines.forEach((line, n) => {
      if (n) c.fillStyle = style("--soft");
      c.fillText(line, 8, middle + (n - (lines.length - 1) / 2) * 14);
    });
    c.restore();
  }

  axis(c) {
    const span = this.view.to - this.view.from, about = span / Math.max(3, (this.width - GUTTER) / 110);
    const power = 10 ** Math.floor(Math.log10(about));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= about);
    c.strokeStyle = style("--line"); c.fillStyle = style("--soft"); c.textAlign = "center";
    for (let at = Math.ceil(this.view.from / step) * step; at <= this.view.to; at += step) {
      const x = Math.round(this.x(at)) + 0.5;
      c.beginPath(); c.moveTo(x, AXIS - 6); c.lineTo(x, this.height); c.stroke();
      c.fillText(time(at), Math.min(x, this.width - 26), 9);
    }
    c.textAlign = "left";
  }

  // From what signalled to what waited: all where few are in view, else those of the one pointed at.
  arrows(c) {
    const shown = [];
    for (const row of this.rows) {
      if (!row.track) continue;
      const many = row.track.waits.filter((w) => w[4] >= 0 && w[3] >= this.view.from && w[2] <= this.view.to);
      const focus = this.view.focus;
      if (many.length <= 40) shown.push(...many.map((w) => [row, w]));
      else if (focus && focus.row === row) shown.push(...many.filter((w) => w[0] === focus.block).map((w) => [row, w]));
    }
    c.save(); c.beginPath(); c.rect(GUTTER, 0, this.width, this.height); c.clip();
    c.strokeStyle = c.fillStyle = style("--wait"); c.lineWidth = 1;
    for (const [row, wait] of shown) {
      const from = this.rows.find((r) => r.track && r.track.number === wait[5]);
      if (!from) continue;
      const x0 = this.x(from.track.end(wait[4])), y0 = from.y + from.height / 2;
      const x1 = this.x(row.track.at[wait[0]]), y1 = row.y + row.height / 2;
      c.globalAlpha = 0.75;
      c.beginPath(); c.moveTo(x0, y0); c.bezierCurveTo(x0 + 14, y0, x1 - 14, y1, x1, y1); c.stroke();
      c.beginPath(); c.moveTo(x1, y1); c.lineTo(x1 - 6, y1 - 3); c.lineTo(x1 - 6, y1 + 3); c.fill();
    }
    c.restore();
  }

  listen() {
    const canvas = this.canvas, view = this.view;
    const at = (event) => event.clientX - canvas.getBoundingClientRect().left;
    canvas.addEventListener("pointerdown", (event) => {
      this.drag = { from: Math.max(GUTTER, at(event)), to: at(event) };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (this.drag) { this.drag.to = Math.max(GUTTER, at(event)); this.draw(); return; }
      this.point(event, at(event), event.clientY - canvas.getBoundingClientRect().top);
    });
    canvas.addEventListener("pointerup", () => {
      const drag = this.drag; this.drag = null;
      if (drag && Math.abs(drag.to - drag.from) > 4) view.set(this.ps(Math.min(drag.from, drag.to)), this.ps(Math.max(drag.from, drag.to)));
      else this.draw();
    });
    canvas.addEventListener("pointerleave", () => { tip.hide(); if (view.focus) { view.focus = null; view.draw(); } });
    canvas.addEventListener("dblclick", () => view.set(0, view.total));
    canvas.addEventListener("wheel", (event) => {
      const span = view.to - view.from, sideways = event.shiftKey ? event.deltaY : event.deltaX;
      if (event.ctrlKey || event.metaKey) view.zoom(Math.exp(event.deltaY / 300), this.ps(at(event)));
      else if (Math.abs(sideways) > 0) view.set(view.from + span * sideways / 900, view.to + span * sideways / 900);
      else return;
      event.preventDefault();
    }, { passive: false });
  }

  point(event, x, y) {
    const row = this.rows.find((r) => y >= r.y && y < r.y + r.height + GAP);
    const found = row && x >= GUTTER ? row.hit(this.ps(x), y - row.y, (this.view.to - this.view.from) / this.width) : null;
    if (found) tip.show(event, found.text); else tip.hide();
    const focus = found && found.block !== undefined ? { row, block: found.block } : null;
    const before = this.view.focus;
    if ((before && before.block) !== (focus && focus.block) || (before && before.row) !== (focus && focus.row)) {
      this.view.focus = focus; this.draw();
    }
  }
}

// A queue's instructions, their distances added up.
class Track {
  constructor(data, number) {
    Object.assign(this, data);
    this.number = number; this.at = [];
    let sum = 0;
    for (const distance of data.start) this.at.push(sum += distance);
  }
  end(block) { return this.at[block] + this.length[block]; }
}

function box(c, chart, from, to, y, height, color) {
  const x0 = chart.x(from), x1 = chart.x(to);
  if (x1 < GUTTER || x0 > chart.width) return 0;
  c.fillStyle = color;
  const gap = x1 - x0 > 4 ? 0.6 : 0;
  c.fillRect(x0, y, Math.max(x1 - x0 - gap, 0.7), height);
  return x1 - x0;
}

function inside(c, chart, from, to, y, height, what) {
  const x0 = Math.max(chart.x(from), GUTTER), x1 = Math.min(chart.x(to), chart.width - 8);
  if (x1 - x0 < 30) return;
  c.save(); c.beginPath(); c.rect(x0, y, x1 - x0, height); c.clip();
  c.fillStyle = "#ffffff"; c.fillText(what, x0 + 4, y + height / 2 + 0.5); c.restore();
}

function waits(c, chart, track, y, height) {
  c.globalAlpha = 0.85;
  for (const wait of track.waits) box(c, chart, wait[2], wait[3], y, height, style("--wait"));
  c.globalAlpha = 1;
}

function told(chip, track, block) {
  const source = chip.sources[track.source[block]], count = track.count[block];
  const lines = [chip.names[track.name[block]] + (count > 1 ? ` (${count} instructions)` : ""),
    `${time(track.at[block])} to ${time(track.end(block))}: ${time(track.length[block])}`];
  const flow = track.flow[block];
  if (track.bytes[block]) {
    lines.push(bytes(track.bytes[block]) + (flow >= 0 && count === 1 ? `, ${si(track.bytes[block] * 1e12 /
      Math.max(1, track.length[block] - flow), "B/s")} while they flow, after ${time(flow)}` : ""));
  }
  for (const wait of track.waits.filter((w) => w[0] === block)) {
    const by = wait[5] < 0 ? "" : ` for ${chip.names[chip.tracks[wait[5]].name[wait[4]]]}`;
    lines.push(`waited ${time(wait[3] - wait[2])} for ${chip.names[wait[1]]}${by}`);
  }
  if (source) lines.push(source.file, source.text);
  return lines.join("\n");
}

function computeRow(chip, track, queue, colors) {
  return {
    track, label: queue.name, detail: queue.engines.join(", "), height: 34,
    draw(c, chart, y) {
      waits(c, chart, track, y + 13, 8);
      for (let n = 0; n < track.at.length; n++) {
        const width = box(c, chart, track.at[n], track.end(n), y, 34, colors(track.name[n]));
        if (width > 30) inside(c, chart, track.at[n], track.end(n), y, 34, chip.names[track.name[n]]);
      }
    },
    hit(ps, _, pixel) {
      const block = nearest(track, ps, pixel);
      if (block >= 0) return { block, text: told(chip, track, block) };
      const wait = track.waits.find((w) => ps >= w[2] && ps <= w[3]);
      return wait ? { block: wait[0], text: told(chip, track, wait[0]) } : null;
    },
  };
}

function nearest(track, ps, pixel) {
  for (let n = 0; n < track.at.length; n++) {
    if (ps >= track.at[n] - pixel && ps <= track.end(n) + pixel) return n;
  }
  return -1;
}

// Transfers in flight together lie in lanes: light until their bytes flow.
function dmaRow(chip, track, queue, colors) {
  const free = [], lane = [];
  for (let n = 0; n < track.at.length; n++) {
    let place = free.findIndex((until) => until <= track.at[n]);
    if (place < 0) place = free.length;
    free[place] = track.end(n); lane.push(place);
  }
  const each = Math.max(9, Math.min(16, 44 / free.length)), strip = 9;
  return {
    track, label: queue.name, detail: `${free.length} in flight`, height: free.length * each + strip,
    draw(c, chart, y) {
      waits(c, chart, track, y + 1, strip - 3);
      for (let n = 0; n < track.at.length; n++) {
        const top = y + strip + lane[n] * each, color = colors(track.name[n]);
        const flow = track.flow[n] < 0 ? track.length[n] : track.flow[n];
        c.globalAlpha = 0.35;
        box(c, chart, track.at[n], track.at[n] + flow, top, each - 1, color);
        c.globalAlpha = 1;
        box(c, chart, track.at[n] + flow, track.end(n), top, each - 1, color);
        if (each >= 11) inside(c, chart, track.at[n] + flow, track.end(n), top, each - 1, chip.names[track.name[n]]);
      }
    },
    hit(ps, y, pixel) {
      const place = Math.floor((y - strip) / each);
      for (let n = 0; n < track.at.length; n++) {
        if (lane[n] === place && ps >= track.at[n] - pixel && ps <= track.end(n) + pixel) return { block: n, text: told(chip, track, n) };
      }
      const wait = track.waits.find((w) => ps >= w[2] && ps <= w[3]);
      return wait && y < strip ? { block: wait[0], text: told(chip, track, wait[0]) } : null;
    },
  };
}

function pathRow(chip) {
  return {
    label: "critical path", height: 16,
    draw(c, chart, y) { for (const [what, from, to] of chip.steps) box(c, chart, from, to, y, 16, PATH[what]); },
    hit(ps) {
      const step = chip.steps.find(([, from, to]) => ps >= from && ps <= to);
      return step ? { text: `critical path: ${step[0]}, ${time(step[2] - step[1])}` } : null;
    },
  };
}

function curveRow(label, points, capacity, shown, color, total) {
  const most = Math.max(capacity || 0, ...points.map((p) => p[1])) || 1, height = 46;
  const level = (ps) => { let value = 0; for (const [at, v] of points) { if (at > ps) break; value = v; } return value; };
  return {
    label, detail: `of ${shown(most)}`, height,
    draw(c, chart, y) {
      const up = (v) => y + height - 1 - (height - 4) * v / most;
      c.beginPath(); c.moveTo(chart.x(0), up(0));
      let value = 0;
      for (const [at, v] of points) { c.lineTo(chart.x(at), up(value)); c.lineTo(chart.x(at), up(v)); value = v; }
      c.lineTo(chart.x(total), up(value)); c.lineTo(chart.x(total), up(0)); c.closePath();
      c.fillStyle = color; c.globalAlpha = 0.45; c.fill(); c.globalAlpha = 1;
      c.strokeStyle = color; c.stroke();
    },
    hit(ps) { const value = level(ps); return { text: `${label}: ${shown(value)}, ${percent(value / most)} of ${shown(most)}\nat ${time(ps)}` }; },
  };
}

function slotRows(chip, buffer, color, largest) {
  const source = chip.sources[buffer.source];
  const height = Math.max(5, Math.min(26 * buffer.bytes / largest, 64 / buffer.slots));
  return {
    label: `${buffer.name}  ${bytes(buffer.bytes)}${buffer.slots > 1 ? ` × ${buffer.slots}` : ""}`,
    detail: source ? source.place : "", height: Math.max(14, buffer.slots * (height + 1)),
    draw(c, chart, y) {
      for (const [slot, from, to] of buffer.lives) box(c, chart, from, to, y + slot * (height + 1), height, color);
    },
    hit(ps, y) {
      const slot = Math.floor(y / (height + 1));
      const life = buffer.lives.find(([s, from, to]) => s === slot && ps >= from && ps <= to);
      const lines = [`${buffer.name}: ${buffer.type}, slot ${slot} of ${buffer.slots}, ${bytes(buffer.bytes)} at ${buffer.offset + slot * buffer.bytes}`];
      if (life) lines.push(`holds from ${time(life[1])} to ${time(life[2])}: ${time(life[2] - life[1])}`);
      if (source) lines.push(source.file, source.text);
      return { text: lines.join("\n") };
    },
  };
}
