package frontend

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxTold bounds each text of a failure, in bytes: many are kept.
const maxTold = 256

// failed reports whether a request that is over was not served well, other than by its
// client's doing.
func (q *request) failed() bool {
	return q.status >= 500 || q.reason != "" && (q.status < 400 || q.status > 499)
}

// failure is what is told of a request that failed. Like the access log it leaves out
// the query.
func (q *request) failure(duration time.Duration) *resealv1.Failure {
	f := &resealv1.Failure{
		Time: timestamppb.New(q.started.Add(duration)), Duration: durationpb.New(duration),
		Listener: q.client.slot.name, Route: q.match.Route, Pool: q.match.Pool, Endpoint: q.x.Endpoint,
		Status: int32(q.status), Reason: q.reason, Blame: q.blame(),
		Reused: q.x.Reused, Resumed: q.x.Resumed, Miss: q.x.Miss, Attempts: int32(q.x.Attempts),
		Host: told(q.client.serverName),
	}
	if !q.raw {
		path, _, _ := strings.Cut(q.head.Target, "?")
		f.Method, f.Host, f.Path = told(q.head.Method), told(q.authority), told(path)
		f.RequestId = told(q.head.Fields.Get("x-request-id"))
	}
	if q.err != nil {
		f.Error = told(q.err.Error())
	}
	return f
}

// blame says who caused a failure: the backend's leg knows of its own.
func (q *request) blame() resealv1.Failure_Blame {
	switch {
	case q.reason == "":
		return resealv1.Failure_BLAME_BACKEND // which answered so
	case q.reason == q.x.Reason:
		return q.x.Blame
	}
	switch q.reason {
	case "memory_limit", "drain_timeout", "internal":
		return resealv1.Failure_BLAME_EDGE
	case "client_abort", "client_stalled", "timeout_body":
		return resealv1.Failure_BLAME_CLIENT
	case "protocol_error", "reset":
		return resealv1.Failure_BLAME_BACKEND
	}
	return resealv1.Failure_BLAME_UNSPECIFIED
}

// told copies a text, so that a failure that is kept keeps no buffer.
func told(text string) string {
	if len(text) > maxTold {
		return strings.ToValidUTF8(text[:maxTold-len("…")], "") + "…"
	}
	return strings.ToValidUTF8(strings.Clone(text), "�")
}
