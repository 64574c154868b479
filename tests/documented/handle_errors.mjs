// Looks at a job and says what to do where that is refused. usage: node handle_errors.mjs JOB_ID
const response = await fetch(`${process.env.API_URL}/jobs/${process.argv[2]}`, {
  headers: { 'X-API-Key': process.env.API_KEY },
})
const body = await response.json()

if (response.ok) {
  console.log(`status: ${body.status}`)
  process.exit(0)
}
switch (response.status) {
  case 404:
    console.log(`${body.error} (${body.details.error_type}): ${body.details.message}`)
    break
  case 403:
    console.log(`not yours: ${body.detail}`)
    break
  case 401:
    console.log(`who are you? ${body.detail}`)
    break
  default:
    throw new Error(`HTTP ${response.status}`)
}
body.suggestions.forEach((suggestion) => console.log(`- ${suggestion}`))
process.exit(response.status - 400)
