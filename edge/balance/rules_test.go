package balance

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestDefaultsAreUsable(t *testing.T) {
	r := NewRules((&resealv1.BackendPool{}).WithDefaults())
	if r.ejectAfter != 5 || r.ejectTime <= 0 || r.maxEjectShare <= 0 || r.LooksUp() || r.Checks() {
		t.Errorf("%+v", r)
	}
}

func TestLoopsDiffer(t *testing.T) {
	lookUp := func(name string, interval time.Duration) *resealv1.BackendPool {
		return &resealv1.BackendPool{Dns: &resealv1.DNSEndpoints{Name: name, Port: 1, RefreshInterval: durationpb.New(interval)}}
	}
	check := func(path string, interval time.Duration) *resealv1.BackendPool {
		return &resealv1.BackendPool{HealthCheck: &resealv1.HealthCheck{Path: path, Interval: durationpb.New(interval)}}
	}
	for _, test := range []struct {
		from, to *resealv1.BackendPool
		want     bool
	}{
		{&resealv1.BackendPool{}, &resealv1.BackendPool{}, false},
		{&resealv1.BackendPool{}, lookUp("a.test", time.Second), true},
		{lookUp("a.test", time.Second), lookUp("a.test", time.Second), false},
		{lookUp("a.test", time.Second), lookUp("b.test", time.Second), true},
		{lookUp("a.test", time.Second), lookUp("a.test", time.Minute), true},
		{&resealv1.BackendPool{}, check("/", time.Second), true},
		{check("/", time.Second), check("/other", time.Second), false},
		{check("/", time.Second), check("/", time.Minute), true},
	} {
		if got := NewRules(test.from).LoopsDiffer(NewRules(test.to)); got != test.want {
			t.Errorf("from %v to %v: %t", test.from, test.to, got)
		}
	}
}
