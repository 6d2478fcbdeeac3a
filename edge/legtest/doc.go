// Package legtest shows each leg of the data path, whose exchanges belong to event
// loops, as callers know them who block: net/http and tests written for it. It
// is not built for speed.
package legtest
