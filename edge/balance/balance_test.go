package balance

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// balancer has views published into the returned place.
func balancer(resolve func(context.Context, string) ([]netip.Addr, error)) (*Balancer, *[]*View) {
	var views []*View
	b := New(Config{
		Pool: "p", Logger: slog.New(slog.DiscardHandler), Resolve: resolve,
		Publish: func(view *View) { views = append(views, view) },
	})
	return b, &views
}

func (b *Balancer) set(spec *resealv1.BackendPool) *View {
	var published *View
	b.Update(NewRules(spec.WithDefaults()), func(view *View) { published = view })
	return published
}

func static(addresses ...string) *resealv1.BackendPool {
	spec := &resealv1.BackendPool{}
	for _, address := range addresses {
		spec.Endpoints = append(spec.Endpoints, &resealv1.Endpoint{Address: address})
	}
	return spec
}

// Endpoints outlive configurations, with what is known of them.
func TestUpdateKeepsEndpoints(t *testing.T) {
	b, _ := balancer(nil)
	first := b.set(static("a:1", "b:1"))
	a := first.Endpoints()[0]
	a.Begin()
	second := b.set(static("c:1", "a:1", "a:1"))
	if all := second.Endpoints(); len(all) != 2 || all[0].Address != "c:1" || all[1] != a || all[1].InFlight() != 1 {
		t.Errorf("%v", all)
	}
	if all := first.Endpoints(); len(all) != 2 || all[1].Address != "b:1" {
		t.Error("a view has changed")
	}
}

// The last endpoint is never ejected, and ejections end with what they are for.
func TestEjections(t *testing.T) {
	b, _ := balancer(nil)
	spec := static("a:1", "b:1")
	after, most := uint32(2), uint32(100)
	spec.OutlierDetection = &resealv1.OutlierDetection{
		ConsecutiveErrors: &after, MaxEjectionPercent: &most, EjectionTime: durationpb.New(time.Hour), Statuses: []uint32{503},
	}
	view := b.set(spec)
	a, other := view.Endpoints()[0], view.Endpoints()[1]
	view.Answered(a, 503)
	view.Answered(a, 200)
	view.Answered(a, 503)
	if view.Ejected(a, time.Now()) {
		t.Error("ejected by errors that were not in a row")
	}
	b.Failed(a)
	for range 5 {
		b.Failed(other)
	}
	if !view.Ejected(a, time.Now()) || view.Ejected(other, time.Now()) || view.Available(a, time.Now()) {
		t.Errorf("a is out: %t, b is out: %t", view.Ejected(a, time.Now()), view.Ejected(other, time.Now()))
	}
	if e := view.Pick(nil, nil, nil); e != other {
		t.Errorf("%s was picked", e.Address)
	}
	if e := view.Pick(nil, nil, []*Endpoint{other}); e != other {
		t.Errorf("%s was picked, which is out", e.Address)
	}
	none := uint32(0)
	spec.OutlierDetection.MaxEjectionPercent = &none
	if b.set(spec).Ejected(a, time.Now()) {
		t.Error("still ejected when nobody may be")
	}
}

// Thresholds turn health, and a verdict holds for the check that it answers.
func TestHealth(t *testing.T) {
	b, _ := balancer(nil)
	spec := static("a:1")
	spec.HealthCheck = &resealv1.HealthCheck{Path: "/", HealthyThreshold: 2, UnhealthyThreshold: 3}
	view := b.set(spec)
	e, asked, streak := view.Endpoints()[0], view.rules.question, 0
	for i, test := range []struct{ failed, unhealthy bool }{
		{true, false}, {true, false}, {false, false}, {true, false}, {true, false}, {true, true}, {false, true}, {false, false},
		{true, false}, {true, false}, {true, true},
	} {
		var failure error
		if test.failed {
			failure = errors.New("status 500")
		}
		streak = b.judge(e, asked, streak, failure)
		if view.Unhealthy(e) != test.unhealthy {
			t.Fatalf("after check %d it is unhealthy: %t", i, !test.unhealthy)
		}
	}
	if !b.set(spec).Unhealthy(e) {
		t.Error("the same check forgot its verdict")
	}
	spec.HealthCheck.Path = "/other"
	if b.set(spec).Unhealthy(e) {
		t.Error("another check has the verdict of the one before")
	}
}

// Look-ups publish views; one that fails changes nothing.
func TestLookUps(t *testing.T) {
	var found []netip.Addr
	var failure error
	b, views := balancer(func(context.Context, string) ([]netip.Addr, error) { return found, failure })
	view := b.set(&resealv1.BackendPool{Dns: &resealv1.DNSEndpoints{Name: "a.test", Port: 443}})
	select {
	case <-view.Resolved():
		t.Fatal("resolved before a look-up")
	default:
	}
	found = []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}
	if !view.Empty() || !b.resolve(t.Context()) || len(*views) != 1 {
		t.Fatalf("%d views published", len(*views))
	}
	<-view.Resolved()
	all := (*views)[0].Endpoints()
	if len(all) != 2 || all[0].Address != "10.0.0.1:443" || all[1].Address != "10.0.0.2:443" {
		t.Errorf("%v", all)
	}
	failure = errors.New("no such host")
	if b.resolve(t.Context()) || len(*views) != 1 {
		t.Errorf("a look-up that failed published %d views", len(*views)-1)
	}
}
