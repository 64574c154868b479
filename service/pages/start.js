// Shows the description of this very service. Every address is relative: a proxy in front may have any name.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  persistAuthorization: false, // a key does not outlive the tab
  validatorUrl: null, // no other host is asked
});
