// Package manifest reads, checks, writes, compares and explains resources in
// their written form: YAML or JSON with apiVersion "reseal/v1", kind, metadata
// and spec.
//
// Reading is strict. Unknown and duplicate fields, wrong types, aliases and
// values out of bounds are errors, each with file, line, column and field path,
// and all of them are reported at once. Durations are written as in Go ("250ms",
// "1h30m"), enum values without prefix in lower case ("tls1.2", "http2").
//
// All functions are safe for concurrent use. Values of fields marked secret in
// the protocol never stand in an error or a Diff.
package manifest
