// Watches a batch until every job of it has come to an end. usage: node monitor_batch.mjs BATCH_ID
const url = `${process.env.API_URL}/jobs/batch/${process.argv[2]}?include_progress=true`
let batch

do {
  if (batch) await new Promise((resolve) => setTimeout(resolve, 300))
  const response = await fetch(url, { headers: { 'X-API-Key': process.env.API_KEY } })
  if (!response.ok) throw new Error(`HTTP ${response.status}`)
  batch = await response.json()
  const { status, overall_progress, completed_jobs, failed_jobs, total_jobs } = batch
  console.log(`${status}: ${overall_progress}% (${completed_jobs} completed, ${failed_jobs} failed of ${total_jobs})`)
} while (batch.completed_jobs + batch.failed_jobs < batch.total_jobs)

for (const job of batch.jobs) console.log(`${job.job_id} ${job.operation} ${job.status} ${job.progress}%`)
process.exit(batch.failed_jobs ? 1 : 0)
