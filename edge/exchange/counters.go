package exchange

import (
	"crypto/tls"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// Counters count what happens in one pool, or on one listener. They are safe for
// concurrent use and fast.
type Counters interface {
	// Add moves a number of the table.
	Add(cell Cell, delta int64)
	// Handshake counts a completed handshake, health checks included. A zero
	// mechanism means a full one, of which miss is the reason.
	Handshake(mechanism resealv1.Mechanism, miss resealv1.MissReason, version uint16, d time.Duration)
	// HandshakeFailed counts one that did not complete.
	HandshakeFailed(d time.Duration)
	// Request counts a finished request or tunnel, failed ones included. reused is
	// whether its connection had served one before.
	Request(reused bool, d time.Duration)
	// Error counts a request that failed for a reason on this leg.
	Error(reason string)
}

// The table: a new counter is an entry here, and an Add where it happens.
var (
	// Opened counts connections: those of clients when they are accepted, those to
	// backends when their handshake is complete.
	Opened = define(Counter{
		Key:      "opened",
		Frontend: Metric{"reseal_frontend_connections_opened_total", "Connections accepted from clients."},
		Backend:  Metric{"reseal_backend_connections_opened_total", "Connections opened to backends."},
		Report:   func(stats *resealv1.Stats, _ []int, n int64) { stats.Connections.Opened = uint64(n) },
	})
	// Closed counts their ends, once each: At(int(a resealv1.CloseKind), By(whether
	// the peer began it)). Those of unspecified kind, as all of clients, are shown nowhere.
	Closed = define(Counter{
		Key:     "closed",
		Backend: Metric{"reseal_backend_connections_closed_total", "Connections to backends by how they ended and who closed first."},
		Labels:  []Label{{Name: "how", Values: values(resealv1.CloseKind(0), "")}, {Name: "by", Values: closers}},
		Rare:    true,
		Report: func(stats *resealv1.Stats, at []int, n int64) {
			if at[0] > 0 {
				stats.Closes[resealv1.Label(resealv1.CloseKind(at[0]))] += uint64(n)
				stats.ClosesBy[closers[at[1]]] += uint64(n)
			}
		},
	})
	// Connections are open: At(Active) or At(Idle).
	Connections = define(Counter{
		Key:      "connections",
		Frontend: Metric{"reseal_frontend_connections", "Open connections of clients."},
		Backend:  Metric{"reseal_backend_connections", "Open connections to backends."},
		Labels:   []Label{{Name: "state", Values: []string{Active: "active", Idle: "idle"}}},
		Gauge:    true,
		Report: func(stats *resealv1.Stats, at []int, n int64) {
			if at[0] == Active {
				stats.Connections.Active = n
			} else {
				stats.Connections.Idle = n
			}
		},
	})
	// Requests counts requests: At(0), or At(1) when the connection had served one
	// before. Counters.Request does.
	Requests = define(Counter{
		Key:     "requests",
		Backend: Metric{"reseal_backend_requests_total", "Requests to backends, by whether the connection had served one before."},
		Labels:  []Label{{Name: "reused", Values: []string{"false", "true"}}},
		Report: func(stats *resealv1.Stats, at []int, n int64) {
			stats.Requests += uint64(n)
			if at[0] == 1 {
				stats.Connections.Reused = uint64(n)
			}
		},
	})
	// Full counts full handshakes: At(int(a resealv1.MissReason), TLSVersion(version)).
	// Counters.Handshake does. They are no counter of their own but the sum of the
	// misses, so the two can't differ.
	Full = define(Counter{
		Key:    "full",
		Labels: []Label{{Name: "reason", Values: reasons}, versions},
		Report: func(stats *resealv1.Stats, at []int, n int64) {
			stats.Misses[reasons[at[0]]] += uint64(n)
			stats.Handshakes.Full += uint64(n)
		},
	})
	// Resumed counts resumed handshakes: At(int(a resealv1.Mechanism),
	// TLSVersion(version)). Counters.Handshake does.
	Resumed = define(Counter{
		Key:    "resumed",
		Labels: []Label{{Name: "mechanism", Values: values(resealv1.Mechanism(0), "")}, versions},
		Report: func(stats *resealv1.Stats, at []int, n int64) {
			switch resealv1.Mechanism(at[0]) {
			case resealv1.Mechanism_MECHANISM_SESSION_ID:
				stats.Handshakes.ResumedSessionId += uint64(n)
			case resealv1.Mechanism_MECHANISM_TICKET:
				stats.Handshakes.ResumedTicket += uint64(n)
			case resealv1.Mechanism_MECHANISM_PSK:
				stats.Handshakes.ResumedPsk += uint64(n)
			}
		},
	})
	// Failed counts handshakes that did not complete. Counters.HandshakeFailed does.
	Failed = define(Counter{
		Key:    "failed",
		Report: func(stats *resealv1.Stats, _ []int, n int64) { stats.Handshakes.Failed = uint64(n) },
	})
	// Private counts connections that became their client's own, since NTLM or
	// Negotiate authenticates them.
	Private = define(Counter{
		Key: "private",
		Backend: Metric{"reseal_backend_connections_private_total",
			"Connections to backends that became one client's own, since NTLM or Negotiate authenticates them."},
	})
	// Share is how many connections to each endpoint a pool may have of what the fleet
	// may (connections.maxPerFleet). 0: the fleet has no limit.
	Share = define(Counter{
		Key:     "connection_share",
		Backend: Metric{"reseal_backend_connection_share", "Connections to each endpoint that are this edge's share of connections.maxPerFleet."},
		Gauge:   true,
		Rare:    true,
		Report:  func(stats *resealv1.Stats, _ []int, n int64) { stats.Connections.Share = n },
	})
	// HandshakesWaiting are connections of clients that have said hello and wait for
	// their turn.
	HandshakesWaiting = define(Counter{
		Key:      "handshakes_waiting",
		Frontend: Metric{"reseal_handshakes_waiting", "Connections of clients that have said hello and wait for their turn."},
		Gauge:    true,
	})
	// HandshakesWaited counts those that had to, once they wait no more.
	HandshakesWaited = define(Counter{
		Key:      "handshakes_waited",
		Frontend: Metric{"reseal_handshakes_waited_total", "Handshakes with clients that had to wait for their turn."},
	})
	// HandshakesRefused counts connections that were closed since too many waited.
	HandshakesRefused = define(Counter{
		Key:      "handshakes_refused",
		Frontend: Metric{"reseal_handshakes_refused_total", "Connections of clients that were closed before the handshake, since too many waited."},
	})
	// Waits counts the requests of clients by how long they waited for the head of the
	// answer: At(Wait(d)).
	Waits = define(Counter{
		Key:       "waits",
		Labels:    []Label{{Name: "wait", Values: resealv1.WaitLabels}},
		Listeners: true,
		Report:    func(stats *resealv1.Stats, at []int, n int64) { stats.Waits[resealv1.WaitLabels[at[0]]] = uint64(n) },
	})
	// Answers counts the requests of clients by their status code (RFC 9110 section
	// 15), and connections of protocol tls by the code that their end amounts to, 0
	// when all went well: At(code). Like Waits it stands last, since pools need no room
	// for it.
	Answers = define(Counter{
		Key:       "answers",
		Frontend:  Metric{"reseal_requests_total", "Requests of clients by status code; 0 is a connection of protocol tls that ended well."},
		Labels:    []Label{{Name: "code", Values: codes(), Other: maxCode}},
		Rare:      true,
		Listeners: true,
		Report: func(stats *resealv1.Stats, at []int, n int64) {
			if code := at[0]; code >= 100 && code < maxCode {
				stats.Answers[classes[code/100]] += uint64(n)
			}
		},
	})
)

// Values of the labels of Connections and Closed.
const (
	Active = 0
	Idle   = 1

	ByUs   = 0
	ByPeer = 1
)

// By is the value of the label by of Closed.
func By(peer bool) int {
	if peer {
		return ByPeer
	}
	return ByUs
}

// Values of the label version of Full and Resumed.
const (
	TLSOther = iota
	TLS12
	TLS13
)

// maxCode is the first number that is not an HTTP status code.
const maxCode = 600

var (
	classes  = [...]string{1: "1xx", 2: "2xx", 3: "3xx", 4: "4xx", 5: "5xx"}
	reasons  = values(resealv1.MissReason(0), "unspecified")
	closers  = []string{ByUs: "us", ByPeer: "peer"}
	versions = Label{Name: "version", Values: []string{TLSOther: "other", TLS12: "tls1.2", TLS13: "tls1.3"}}
)

// TLSVersion is the value of the label version for a tls.Version constant.
func TLSVersion(version uint16) int {
	switch version {
	case tls.VersionTLS12:
		return TLS12
	case tls.VersionTLS13:
		return TLS13
	default:
		return TLSOther
	}
}

// Wait is the value of the label of Waits.
func Wait(d time.Duration) int {
	for place, bound := range resealv1.WaitBounds {
		if d <= bound {
			return place
		}
	}
	return len(resealv1.WaitBounds)
}

// values are those of a label that shows an enum of the contract, by number.
// unspecified is the one of 0.
func values(enum protoreflect.Enum, unspecified string) []string {
	all := enum.Descriptor().Values()
	values := make([]string, all.Len())
	for number := range values {
		values[number] = resealv1.ValueLabel(all.ByNumber(protoreflect.EnumNumber(number)))
	}
	values[0] = unspecified
	return values
}

func codes() []string {
	values := make([]string, maxCode+1)
	for code := range values {
		values[code] = strconv.Itoa(code)
	}
	values[maxCode] = "other"
	return values
}

// Counter is an entry of the table: a number, or one per value of its labels.
type Counter struct {
	// Key names it to a process of another release, so it never changes.
	Key string
	// Frontend and Backend are the metrics that show it, of listeners and of pools.
	Frontend, Backend Metric
	// Labels are those of the metric, beside the name of the pool or listener.
	Labels []Label
	// Gauge is set for what also goes down. It is shown as 0 when it is below.
	Gauge bool
	// Rare is set when the metric leaves out what is 0.
	Rare bool
	// Listeners is set for what pools don't count.
	Listeners bool
	// Report puts what is not 0 into a report, by the places of the labels' values.
	// Nil: it is in none.
	Report func(stats *resealv1.Stats, at []int, n int64)

	first int // the index of its first cell
}

// Metric is a metric's name and what it is. Without a name there is none.
type Metric struct{ Name, Help string }

// Label is a label of a metric. A value "" is not shown.
type Label struct {
	Name   string
	Values []string
	// Other is the place in Values that stands for places outside.
	Other int
}

// Cell is one number of a counter.
type Cell struct {
	Counter *Counter
	offset  int
}

// At is the number for one value of each label, by its place among the values.
func (c *Counter) At(places ...int) Cell {
	offset := 0
	for i := range c.Labels {
		label, place := &c.Labels[i], places[i]
		if place < 0 || place >= len(label.Values) {
			place = label.Other
		}
		offset = offset*len(label.Values) + place
	}
	return Cell{c, offset}
}

// Index is the number's place among all of the table.
func (c Cell) Index() int { return c.Counter.first + c.offset }

// Places are what At was given, one value of each label.
func (c Cell) Places() []int {
	places := make([]int, len(c.Counter.Labels))
	offset := c.offset
	for i := len(places) - 1; i >= 0; i-- {
		size := len(c.Counter.Labels[i].Values)
		places[i], offset = offset%size, offset/size
	}
	return places
}

// Key names the number to a process of another release: the counter's key, and the
// labels' values.
func (c Cell) Key() string {
	key := c.Counter.Key
	for i, place := range c.Places() {
		key += "/" + c.Counter.Labels[i].Values[place]
	}
	return key
}

// Size is how many numbers the counter has.
func (c *Counter) Size() int {
	size := 1
	for i := range c.Labels {
		size *= len(c.Labels[i].Values)
	}
	return size
}

// Cells are all numbers of the counter.
func (c *Counter) Cells() []Cell {
	cells := make([]Cell, c.Size())
	for offset := range cells {
		cells[offset] = Cell{c, offset}
	}
	return cells
}

// table holds all counters in the order of their cells.
var table []*Counter

func define(c Counter) *Counter {
	if last := len(table) - 1; last >= 0 {
		c.first = table[last].first + table[last].Size()
	}
	table = append(table, &c)
	return &c
}

// Table is all counters. The cells of each follow those of the one before.
func Table() []*Counter { return slices.Clone(table) }
