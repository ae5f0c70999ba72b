// Which points no other dominates, and where the front bends. Plain functions of numbers.

/** Which points are on the front: costs are better when smaller, losses too. Equal points do not dominate each other. */
function onFront(points) {
  const order = points.map((_, index) => index).sort((a, b) => points[a].x - points[b].x || points[a].loss - points[b].loss);
  const front = new Array(points.length).fill(false);
  let best = Infinity;
  let bestCost = -Infinity;
  for (const index of order) {
    const { x, loss } = points[index];
    if (loss < best || (loss === best && x === bestCost)) {
      front[index] = true;
      best = loss;
      bestCost = x;
    }
  }
  return front;
}

/** The point of a front (sorted by x) farthest below the line between its ends, both axes scaled to 0..1; null for
 * fewer than three points or a front that does not bend inwards. */
function kneeOf(front, logarithmic) {
  if (front.length < 3) return null;
  const height = (point) => (logarithmic ? Math.log(point.loss) : point.loss);
  const first = front[0];
  const last = front[front.length - 1];
  const width = last.x - first.x;
  const drop = height(first) - height(last);
  if (!(width > 0) || !(drop > 0)) return null;
  let knee = null;
  let depth = 1e-9;
  for (const point of front) {
    const below = 1 - (point.x - first.x) / width - (height(point) - height(last)) / drop;
    if (below > depth) [knee, depth] = [point, below];
  }
  return knee;
}
