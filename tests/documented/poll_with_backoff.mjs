// Asks less and less often until the job is done. usage: node poll_with_backoff.mjs JOB_ID
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

let delay = 200
for (let attempt = 1; ; attempt++) {
  const response = await fetch(`${process.env.API_URL}/jobs/${process.argv[2]}/status`, {
    headers: { 'api-key': process.env.API_KEY, 'Content-Type': 'application/json' },
  })
  if (!response.ok) throw new Error(`HTTP ${response.status}`)
  const job = await response.json()
  console.log(`attempt ${attempt}: ${job.status} ${job.progress?.percentage ?? 0}% ${job.progress?.message ?? ''}`)
  if (job.status === 'completed') {
    console.log(`${job.operation} completed at ${job.completed_at}`)
    break
  }
  if (job.status === 'failed' || job.status === 'cancelled') {
    console.error(`${job.operation} ${job.status}: ${job.error_details.error_type}: ${job.error_details.message}`)
    process.exit(1)
  }
  await sleep(delay)
  delay = Math.min(delay * 1.5, 10_000)
}
