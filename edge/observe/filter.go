package observe

import (
	"slices"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// fits reports whether a request is one that is asked for, but for the sample.
func fits(f *resealv1.RequestFilter, o *exchange.Outcome) bool {
	return is(f.GetPool(), o.Pool) && is(f.GetListener(), o.Listener) && is(f.GetRoute(), o.Route) &&
		is(f.GetHost(), o.Name) && strings.HasPrefix(o.Path, f.GetPathPrefix()) &&
		o.Duration >= f.GetSlowerThan().AsDuration() && fitsAnswer(f, o) && fitsConnection(f, o)
}

// is compares with a wanted name. None is any.
func is(want, name string) bool { return want == "" || want == name }

func fitsAnswer(f *resealv1.RequestFilter, o *exchange.Outcome) bool {
	if reasons := f.GetReasons(); len(reasons) > 0 && !slices.Contains(reasons, o.Reason) {
		return false
	}
	return len(f.GetStatuses()) == 0 || slices.ContainsFunc(f.GetStatuses(), func(r *resealv1.StatusRange) bool {
		return int(r.GetFirst()) <= o.Status && o.Status <= int(r.GetLast())
	})
}

// fitsConnection looks at the connection on the side that is meant.
func fitsConnection(f *resealv1.RequestFilter, o *exchange.Outcome) bool {
	if f.GetSession() == resealv1.RequestFilter_SESSION_UNSPECIFIED && len(f.GetMisses()) == 0 {
		return true
	}
	reused, resumed, miss, there := o.Exchange.Reused, o.Exchange.Resumed, o.Exchange.Miss, connected(o)
	if f.GetSide() == resealv1.RequestFilter_SIDE_FRONTEND {
		reused, resumed, miss, there = !o.Exchange.First, o.ClientResumed, o.ClientMiss, true
	}
	session := resealv1.RequestFilter_SESSION_FULL
	switch {
	case !there:
		return false
	case reused:
		session = resealv1.RequestFilter_SESSION_REUSED
	case resumed:
		session = resealv1.RequestFilter_SESSION_RESUMED
	}
	if want := f.GetSession(); want != resealv1.RequestFilter_SESSION_UNSPECIFIED && want != session {
		return false
	}
	return len(f.GetMisses()) == 0 || session == resealv1.RequestFilter_SESSION_FULL && slices.Contains(f.GetMisses(), miss)
}

// connected reports whether a request had a connection to the backend.
func connected(o *exchange.Outcome) bool { return o.Exchange.TLSVersion != 0 }
