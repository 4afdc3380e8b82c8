// Labels of a job as one line of text: `team=maths, try=3`.

/** The line. */
export const labelsText = (labels) => Object.entries(labels ?? {}).map(([key, value]) => `${key}=${value}`).join(", ");

/** The labels; raises an Error that says which part has no value. */
export function parseLabels(text) {
  const labels = {};
  for (const part of text.split(",").map((one) => one.trim()).filter(Boolean)) {
    const [key, ...value] = part.split("=");
    if (!value.length) throw new Error(`The label ${part} has no value: write key=value.`);
    labels[key.trim()] = value.join("=").trim();
  }
  return labels;
}
