package feed

import (
	"context"
	"fmt"
	"io/fs"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// partial is an edge that refuses pools at the address "bad", and everything while
// broken is set.
type partial struct {
	mu      sync.Mutex
	serving map[string]*resealv1.Resource
	broken  bool
	calls   int
}

func (p *partial) breakIt(broken bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.broken = broken
}

func (p *partial) applied() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls
}

func (p *partial) at(name string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return addressOf(p.serving["BackendPool/"+name])
}

func addressOf(r *resealv1.Resource) string {
	if r == nil {
		return "nowhere"
	}
	return r.GetBackendPool().GetEndpoints()[0].GetAddress()
}

func (p *partial) apply(_ context.Context, candidate Candidate) Outcome {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls++
	if p.broken {
		return Outcome{Violations: []*resealv1.Violation{{Description: "broken"}}}
	}
	next, outcome := map[string]*resealv1.Resource{}, Outcome{Violations: candidate.Unusable}
	for _, violation := range candidate.Unusable {
		outcome.HeldBack = append(outcome.HeldBack, violation.GetResource())
	}
	for _, r := range candidate.Snapshot.All() {
		key := r.Ref().Key()
		if addressOf(r) != "bad" {
			next[key] = r
			continue
		}
		outcome.Violations = append(outcome.Violations, &resealv1.Violation{Resource: r.Ref(), Description: "bad"})
		outcome.HeldBack = append(outcome.HeldBack, r.Ref())
		if last := p.serving[key]; last != nil {
			next[key] = last
		}
	}
	p.serving = next
	if len(outcome.Violations) > 0 {
		outcome.InForce = []*resealv1.Resource{}
		for _, r := range next {
			outcome.InForce = append(outcome.InForce, r)
		}
	}
	return outcome
}

func partly(p *partial) func(*Config) { return func(c *Config) { c.Apply = p.apply } }

// What is refused of a revision does not hold back the rest, and the answer says
// which is which.
func TestPartOfARevision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &partial{}
		var answers []*resealv1.SyncRequest
		h := run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
			one := full(1, encoded(t, "a", "a:1"), encoded(t, "b", "b:1"))
			got, err := send(stream, one, full(2, encoded(t, "a", "bad"), encoded(t, "b", "b:2")), full(3, encoded(t, "a", "bad"), encoded(t, "b", "b:3")),
				// The content of revision 1 again: it is not what is in force.
				full(4, encoded(t, "a", "a:1"), encoded(t, "b", "b:1")))
			if answers = got; err != nil {
				return err
			}
			return hold(stream)
		}, partly(p), func(c *Config) { c.Unchanged = func(int64) { t.Error("taken for unchanged") } })
		settle(0)
		var said []string
		for _, answer := range answers {
			if ack := answer.GetAck(); ack != nil {
				said = append(said, fmt.Sprint("ack ", ack.GetRevision()))
			}
			if nack := answer.GetNack(); nack != nil {
				said = append(said, fmt.Sprint("nack ", nack.GetRevision(), " partly ", nack.GetPartly(), " serving ", nack.GetServingRevision(),
					" held back ", refNames(nack.GetHeldBack()), " ", nack.GetViolations()[0].Text()))
			}
		}
		want := []string{"ack 1",
			"nack 2 partly true serving 1 held back [BackendPool/a] BackendPool/a: bad",
			"nack 3 partly true serving 1 held back [BackendPool/a] BackendPool/a: bad", "ack 4"}
		if diff := cmp.Diff(want, said); diff != "" {
			t.Error(diff)
		}
		if p.at("a") != "a:1" || p.at("b") != "b:1" || h.Revision() != 4 {
			t.Errorf("serving %s and %s", p.at("a"), p.at("b"))
		}
	})
}

// What was really served is kept, not what was sent.
func TestPartIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := &memory{}
		odd := &resealv1.EncodedResource{Kind: "Teapot", Name: "t", Resource: []byte{}}
		first := run(t, state, func(stream syncStream, _ *resealv1.Hello) error {
			if _, err := send(stream, full(1, encoded(t, "a", "a:1")), full(2, encoded(t, "a", "bad"), encoded(t, "b", "b:2"), odd)); err != nil {
				t.Error(err)
			}
			return hold(stream)
		}, partly(&partial{}))
		settle(0)
		first.stop()
		p := &partial{}
		second := run(t, state, func(stream syncStream, hello *resealv1.Hello) error {
			return fs.ErrClosed // no control plane
		}, partly(p))
		settle(0)
		if err := second.ApplyLastGood(t.Context()); err != nil || p.at("a") != "a:1" || p.at("b") != "b:2" {
			t.Errorf("%v, serving %s and %s", err, p.at("a"), p.at("b"))
		}
		if err := second.ApplyLastGood(t.Context()); err != nil || p.applied() != 1 {
			t.Errorf("%v; applied %d times", err, p.applied())
		}
	})
}

// A first configuration that is refused in part is kept as well, though no
// revision was ever served as a whole.
func TestFirstPartIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		state := &memory{}
		first := run(t, state, func(stream syncStream, _ *resealv1.Hello) error {
			answers, err := send(stream, full(7, encoded(t, "a", "bad"), encoded(t, "b", "b:2")))
			if err != nil || !answers[0].GetNack().GetPartly() || answers[0].GetNack().GetServingRevision() != 0 {
				t.Errorf("%v %v", answers, err)
			}
			return hold(stream)
		}, partly(&partial{}))
		settle(0)
		select {
		case <-first.Synced():
		default:
			t.Error("a part is in force, and the start waits on")
		}
		first.stop()
		p := &partial{}
		second := run(t, state, func(stream syncStream, hello *resealv1.Hello) error {
			if hello.GetRevision() != 0 {
				t.Errorf("claims to hold revision %d", hello.GetRevision())
			}
			return hold(stream)
		}, partly(p))
		settle(0)
		if err := second.ApplyLastGood(t.Context()); err != nil || p.at("b") != "b:2" {
			t.Errorf("%v, serving %s", err, p.at("b"))
		}
	})
}

// When files change, the control plane hears of a refusal after an ack, and of its
// end.
func TestAgainTellsWhatChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &partial{}
		heard := make(chan *resealv1.SyncRequest, 10)
		h := run(t, &memory{}, func(stream syncStream, _ *resealv1.Hello) error {
			if err := stream.Send(updateMessage(full(1, encoded(t, "a", "a:1")))); err != nil {
				return err
			}
			for {
				answer, err := stream.Recv()
				if err != nil {
					return err
				}
				heard <- answer
			}
		}, partly(p))
		settle(0)
		for range 2 { // the second says nothing new
			h.Again()
			settle(0)
		}
		p.breakIt(true)
		h.Again()
		settle(0)
		p.breakIt(false)
		settle(2 * retryInterval)
		close(heard)
		var said []string
		for answer := range heard {
			said = append(said, fmt.Sprint(answer.GetAck().GetRevision(), answer.GetNack().GetRevision(), answer.GetNack().GetPartly()))
		}
		if diff := cmp.Diff([]string{"1 0 false", "0 1 false", "1 0 false"}, said); diff != "" {
			t.Error(diff)
		}
		if p.applied() != 5 {
			t.Errorf("applied %d times", p.applied())
		}
	})
}
