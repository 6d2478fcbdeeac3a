package exchange

import (
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Outcome is what became of a request, or of a connection of protocol tls, that is
// over. Its texts are those of buffers that are used again: whoever keeps one keeps
// what Told makes of it.
type Outcome struct {
	// Ended is when it ended, Duration how long that was after its head.
	Ended    time.Time
	Duration time.Duration
	// Listener, Route and Pool are names. Route and Pool may be empty.
	Listener, Route, Pool string
	// Protocol is what the client spoke, as in the access log.
	Protocol string
	// Method, Host and Path are the request's as they came, Path without the query.
	// Of a connection of protocol tls there is the SNI, as Host.
	Method, Host, Path string
	// Name is Host as HostName returns it.
	Name string
	// Status is what the client was told, 0 for nothing.
	Status int
	// Reason is as in the access log. "": the backend answered so itself.
	Reason string
	// Blame is who caused a failure.
	Blame resealv1.Failure_Blame
	// Err is the error, nil without one.
	Err error
	// In and Out are bytes of the bodies, or of a tunnel.
	In, Out int64
	// ClientResumed is true when the TLS session of the client's connection was a
	// resumed one, ClientMiss why it was not.
	ClientResumed bool
	ClientMiss    resealv1.MissReason
	// Exchange is what the backend's leg says, and whether the request was the first of
	// its client's connection.
	Exchange *Exchange
}

// Told copies a text, cut to limit bytes, so that who keeps it keeps no buffer.
func Told(text string, limit int) string {
	if len(text) > limit {
		return strings.ToValidUTF8(text[:limit-len("…")], "") + "…"
	}
	return strings.ToValidUTF8(strings.Clone(text), "�")
}
