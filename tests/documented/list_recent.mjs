// Lists the jobs of the last day, page by page. usage: node list_recent.mjs [STATUS [TAGS]]
const [status, tags] = process.argv.slice(2)
const query = new URLSearchParams({ created_after: new Date(Date.now() - 86_400_000).toISOString(), limit: 10, offset: 0 })
if (status) query.set('status', status)
if (tags) query.set('tags', tags)

for (;;) {
  const response = await fetch(`${process.env.API_URL}/jobs?${query}`, { headers: { 'X-API-Key': process.env.API_KEY } })
  if (!response.ok) throw new Error(`HTTP ${response.status}`)
  const { jobs, pagination } = await response.json()
  for (const job of jobs) {
    const reason = job.error_details ? `: ${job.error_details.message}` : ''
    console.log(`${job.job_id} ${job.operation} ${job.status} ${job.created_at}${reason}`)
  }
  if (!pagination.has_more) {
    console.log(`total: ${pagination.total}`)
    break
  }
  query.set('offset', pagination.offset + pagination.limit)
}
