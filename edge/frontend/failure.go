package frontend

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxTold bounds each text of a failure, in bytes: many are kept.
const maxTold = 256

// failed reports whether a request that is over was not served well, other than by its
// client's doing.
func (q *request) failed() bool {
	return q.status >= 500 || q.reason != "" && (q.status < 400 || q.status > 499)
}

// outcome is what is told of a request that is over. Like the access log it leaves out
// the query.
func (q *request) outcome(duration time.Duration) *exchange.Outcome {
	o := &exchange.Outcome{
		Ended: q.started.Add(duration), Duration: duration,
		Listener: q.client.slot.name, Route: q.match.Route, Pool: q.match.Pool,
		Protocol: "tls", Host: q.client.serverName, Name: q.client.sni,
		Status: q.status, Reason: q.reason, Err: q.err, In: q.in, Out: q.out,
		ClientResumed: q.client.resumed, ClientMiss: q.client.miss, Exchange: &q.x,
	}
	if q.failed() {
		o.Blame = q.blame()
	}
	if !q.raw {
		o.Protocol, o.Method, o.Host, o.Name = q.version.String(), q.head.Method, q.authority, q.host
		o.Path, _, _ = strings.Cut(q.head.Target, "?")
	}
	return o
}

// failure is what is kept of a request that failed.
func (q *request) failure(o *exchange.Outcome) *resealv1.Failure {
	f := &resealv1.Failure{
		Time: timestamppb.New(o.Ended), Duration: durationpb.New(o.Duration),
		Listener: o.Listener, Route: o.Route, Pool: o.Pool, Endpoint: o.Exchange.Endpoint,
		Status: int32(o.Status), Reason: o.Reason, Blame: o.Blame,
		Reused: o.Exchange.Reused, Resumed: o.Exchange.Resumed, Miss: o.Exchange.Miss, Attempts: int32(o.Exchange.Attempts),
		Method: exchange.Told(o.Method, maxTold), Host: exchange.Told(o.Host, maxTold), Path: exchange.Told(o.Path, maxTold),
	}
	if !q.raw {
		f.RequestId = exchange.Told(q.head.Fields.Get("x-request-id"), maxTold)
	}
	if o.Err != nil {
		f.Error = exchange.Told(o.Err.Error(), maxTold)
	}
	return f
}

// tell tells those who want to know what became of a request.
func (q *request) tell(duration time.Duration) {
	cfg := &q.client.slot.frontend.cfg
	failed := cfg.Failed != nil && q.failed()
	watched := cfg.Observer != nil && cfg.Observer.Watching()
	if !failed && !watched {
		return
	}
	o := q.outcome(duration)
	if failed {
		cfg.Failed(q.failure(o))
	}
	if watched {
		cfg.Observer.See(o)
	}
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
