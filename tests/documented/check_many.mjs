// Asks for several jobs in one call until all are done. usage: node check_many.mjs JOB_ID...
const query = new URLSearchParams({ job_ids: process.argv.slice(2).join(','), include_progress: true })
let jobs, done

do {
  if (jobs) await new Promise((resolve) => setTimeout(resolve, 300))
  const response = await fetch(`${process.env.API_URL}/jobs/status?${query}`, {
    headers: { 'X-API-Key': process.env.API_KEY },
  })
  if (!response.ok) throw new Error(`HTTP ${response.status}`)
  ;({ jobs } = await response.json())
  done = jobs.filter((job) => ['completed', 'failed', null].includes(job.status))
  console.log(`${done.length} of ${jobs.length} done`)
} while (done.length < jobs.length)

for (const { job_id, status, progress, error } of jobs)
  console.log(status ? `${job_id}: ${status} ${progress.percentage}%` : `${job_id}: ${error.error_type}`)
