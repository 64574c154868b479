// Downloads the result as soon as there is one. usage: node fetch_result.mjs JOB_ID FILE
import { writeFile } from 'node:fs/promises'

const [jobId, file] = process.argv.slice(2)
for (;;) {
  const response = await fetch(`${process.env.API_URL}/jobs/${jobId}/result`, {
    headers: { 'X-API-Key': process.env.API_KEY },
  })
  if (response.ok) {
    const bytes = Buffer.from(await response.arrayBuffer())
    await writeFile(file, bytes)
    console.log(`saved ${bytes.length} bytes of ${response.headers.get('Content-Type')}`)
    break
  }
  console.log(`${response.status}: ${(await response.json()).detail}`)
  const delay = response.headers.get('Retry-After')
  if (delay === null) process.exit(1)
  await new Promise((resolve) => setTimeout(resolve, delay * 1000))
}
