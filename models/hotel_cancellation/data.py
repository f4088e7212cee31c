"""The real data of this family: hotel bookings and what became of them, 2013 to 2017.

Why: the label is really delayed (Antonio, de Almeida & Nunes, Data in Brief 22, 2019; CC BY 4.0;
119,390 bookings of two hotels in Portugal): a booking is made, and weeks or months later it is
cancelled or the guests arrive. `$HEADWATER_DATA` names the folder that holds it.

Invariants: a prediction is asked on the day of the booking, which is the arrival less the lead
time; its label is known on the day of the last change of status. Times are days: within one, rows
come in an order that has nothing to do with their outcome, and a label comes at the end of its day.

Only what is known when a booking is made is written. Left out, as they are set or corrected later,
in part at arrival and so only for those who came: country, parking spaces, the room that was
assigned, changes, days on the waiting list, status. So is the month of arrival: each was seen once
or twice, so a network remembers what happened in it and learns nothing of the next.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cloud_learner.experiment.outside import write_events

_EVENTS = """
WITH bookings AS (
    SELECT *, row_number() OVER () AS row,
           strptime(arrival_date_year || ' ' || arrival_date_month || ' '
                    || arrival_date_day_of_month, '%Y %B %d')::DATE AS arrival
    FROM read_csv(?, all_varchar = true)
)
SELECT (arrival - lead_time::INT)::TIMESTAMPTZ AS event_time,
       CASE hotel WHEN 'City Hotel' THEN 'city' WHEN 'Resort Hotel' THEN 'resort' END AS device,
       device AS hotel, lead_time::INT AS lead_days,
       stays_in_weekend_nights::INT AS weekend_nights, stays_in_week_nights::INT AS week_nights,
       adults::INT AS adults, coalesce(TRY_CAST(children AS INT), 0) AS children,
       babies::INT AS babies, trim(meal) AS meal, market_segment AS segment,
       distribution_channel AS channel, is_repeated_guest::INT AS repeated,
       previous_cancellations::INT AS cancelled_before,
       previous_bookings_not_canceled::INT AS stayed_before, reserved_room_type AS room,
       trim(deposit_type) AS deposit, trim(agent) AS agent, trim(company) AS company,
       customer_type AS customer, adr::DOUBLE AS daily_rate,
       total_of_special_requests::INT AS requests,
       86400.0 * (lead_time::INT + stays_in_weekend_nights::INT + stays_in_week_nights::INT)
           AS until_over_s,
       is_canceled::DOUBLE AS label,
       (reservation_status_date::DATE + 1)::TIMESTAMPTZ - to_seconds(1) AS label_time
FROM bookings
ORDER BY event_time, md5(row::VARCHAR)
"""


def write_data(path: Path) -> int:
    """Write the data file (Parquet) at `path`.

    Returns: the number of rows. Raises: FileNotFoundError when the data set is not there.
    """
    return write_events(
        _EVENTS, "hotel_bookings/hotel_bookings.csv.zip", path, member="hotel_bookings.csv"
    )


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
