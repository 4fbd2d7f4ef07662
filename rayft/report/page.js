// Shows the values under the pointer; the page is complete without it.
for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(svg.dataset.lines);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  svg.parentNode.append(tip);
  svg.addEventListener("pointerleave", () => (tip.hidden = true));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = box.width / svg.viewBox.baseVal.width;
    const x = (event.clientX - box.left) / scale;
    const near = lines.map((line) =>
      line.points.reduce((a, b) => (Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a)));
    tip.textContent = `step ${near[0][0]}\n` + lines.map((line, i) => `${line.name} ${+near[i][1].toPrecision(5)}`).join("\n");
    tip.hidden = false;
    tip.style.top = `${svg.offsetTop + 8}px`;
    tip.style.left = `${Math.min(near[0][2] * scale + 8, box.width - tip.offsetWidth)}px`;
  });
}
